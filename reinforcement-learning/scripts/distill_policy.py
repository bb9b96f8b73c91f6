"""Distills a Stable-Baselines3 teacher into a small PPO student, with a control and a behaviour-cloning baseline.

    python reinforcement-learning/scripts/distill_policy.py
    python reinforcement-learning/scripts/distill_policy.py --student 7 --student_value --seeds 0 1 2 3 4
    python reinforcement-learning/scripts/distill_policy.py --environment LunarLander-v3 --teacher lander.zip
    python reinforcement-learning/scripts/distill_policy.py --environment CartPole-v1 Acrobot-v1

The control is the same student trained by PPO from reward alone, with as many environment steps, rounded up to whole
rollouts. For several environments, the student has one body and a head for each environment. Each environment has a
report, and a student that loads without the others.
"""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from kd.common.cli import parse, run, show_help
from kd.reinforcement_learning.student_model.arguments import DistillArguments, Loss, PolicyArguments, StudentArguments
from kd.reinforcement_learning.teacher_model.recipes import TeacherArguments, TeacherTask, training_recipe

ARGUMENTS = (PolicyArguments, StudentArguments, DistillArguments, TeacherArguments)
if __name__ == "__main__":
    show_help(*ARGUMENTS)  # before the imports below, which take seconds

from kd.common.training.run import Run
from kd.common.training.run_folder import check_is_run_or_empty
from kd.reinforcement_learning.data.environments import (
    Environments,
    fingerprint,
    require_module_on_command_line,
    require_single_process,
    time_limit_warning,
)
from kd.reinforcement_learning.student_model.distillation import Agents, Distillation, PolicyRun
from kd.reinforcement_learning.student_model.evaluation import (
    PolicyEvaluation,
    evaluate,
    random_metrics,
    random_warning,
    report,
)
from kd.reinforcement_learning.student_model.matching import check_loss
from kd.reinforcement_learning.student_model.student import StudentSpec, validate_student
from kd.reinforcement_learning.teacher_model.teacher import (
    Teacher,
    average_policies,
    load_agent,
    load_or_train_teacher,
    mean_returns,
    soft_network,
)


def main() -> None:
    require_single_process()
    args, student_args, distill_args, training = parse(*ARGUMENTS)
    args.output_dir = args.output_dir or str(args.default_folder())
    check_is_run_or_empty(Path(args.output_dir))  # all checks precede the training of a teacher
    loss: Loss = "kl" if args.method == "ppd" else distill_args.loss
    for environment in args.environment:
        check_environment(environment, student_args, loss)

    teachers = load_teachers(args, training, loss)
    specs = [StudentSpec(teacher, student_args, training_recipe("ppo", teacher.environment)) for teacher in teachers]

    run = PolicyRun(args.environment, args, student_args, distill_args, training)
    run.check_inputs(
        ", ".join(map(fingerprint, args.environment)),
        **{f"teacher of {teacher.environment}": teacher.network for teacher in teachers},
    )
    measured = [measure_teacher(run, teacher, args, distill_args.steps) for teacher in teachers]

    for seed_run in run.each_seed():
        train = Distillation(seed_run, specs, distill_args, args.eval_episodes)
        agents: dict[str, Agents] = {}  # by role
        if not args.no_control:
            agents["control"] = train.control()
        agents["student"] = train.ppd_student(args.teacher_weight) if args.method == "ppd" else train.student()
        if not args.no_control:
            agents["behaviour_cloning"] = train.behaviour_cloning()

        for teacher, (teacher_evaluation, random), folder in zip(teachers, measured, seed_run.reports, strict=True):
            environment, evaluations = teacher.environment, {"teacher": teacher_evaluation}
            for role, by_environment in agents.items():
                agent = by_environment[environment]
                evaluations[role] = evaluate([agent], environment, args.episodes, teacher=teacher.network)
            report(seed_run, args.method, environment, evaluations, random, "student", seed_run.folder / folder)
    run.summarize()


def check_environment(environment: str, student: StudentArguments, loss: Loss) -> None:
    """Raises UserError for an environment that cannot be made, or that does not fit the student or the loss."""
    require_module_on_command_line(environment, "the recipe")
    with closing(Environments(environment, 1)) as environments:
        validate_student(student, environment, environments.observation_space)
        check_loss(loss, environments.action_space)


def load_teachers(args: PolicyArguments, training: TeacherArguments, loss: Loss) -> list[Teacher]:
    """Loads or trains one teacher per environment, sets its temperature and averages it with --ensemble_teachers.
    Raises UserError for a loss that the teacher does not support.
    """
    count = len(args.environment)
    statistics: Sequence[str | None] = args.vecnormalize or [None] * (count + len(args.ensemble_teachers))
    more_agents = [  # fails before a teacher is trained
        load_agent(name, args.environment[0], args.trust_pickle, vecnormalize)
        for name, vecnormalize in zip(args.ensemble_teachers, statistics[count:], strict=True)
    ]
    for agent in more_agents:
        check_loss(loss, agent.policy.action_space, agent.deterministic)
    teachers = []
    for environment, name, vecnormalize in zip(args.environment, args.teacher, statistics[:count], strict=True):
        task = TeacherTask(environment, args.episodes, args.eval_episodes)
        agent = load_or_train_teacher(name, task, training, vecnormalize, args.trust_pickle)
        check_loss(loss, agent.policy.action_space, agent.deterministic)
        agents = (agent, *more_agents)
        networks = [soft_network(one, environment, args.teacher_temperature, args.teacher_entropy) for one in agents]
        network = average_policies(networks, args.ensemble_weights) if more_agents else networks[0]
        teachers.append(Teacher(environment, agents, network))
    return teachers


def measure_teacher(run: Run, teacher: Teacher, args: PolicyArguments, steps: int) -> tuple[PolicyEvaluation, float]:
    """Returns the teacher's evaluation and the mean return of random actions; warns about a bad teacher.

    The teacher's curve is constant from step 0 to `steps`: its mean return on the episodes of the students' curves.
    """
    environment = teacher.environment
    ensemble = teacher.network if len(teacher.agents) > 1 else None
    evaluation = evaluate(teacher.agents, environment, args.episodes, ensemble)
    validation = mean_returns(run, {environment: teacher.network}, args.eval_episodes)
    run.history.setdefault("teacher", []).extend({"environment_steps": step} | validation for step in (0, steps))
    random = random_metrics(environment, teacher.agent.policy.action_space, args.episodes)
    run.warn(time_limit_warning(environment))
    for agent in teacher.agents:
        for warning in agent.warnings:
            run.warn(warning)
    entry = evaluation.entry
    run.warn(random_warning(entry["name"], entry["metrics"]["test"], random))
    return evaluation, random["return_mean"]


if __name__ == "__main__":
    run(main)
