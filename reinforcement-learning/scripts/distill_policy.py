"""Distills a Stable-Baselines3 teacher into a small PPO student, with a control and behaviour cloning.

    python reinforcement-learning/scripts/distill_policy.py
    python reinforcement-learning/scripts/distill_policy.py --student 7 --student_value
    python reinforcement-learning/scripts/distill_policy.py --student_observation 0 2
    python reinforcement-learning/scripts/distill_policy.py --teacher zoo/tqc/Hopper-v3_1
    python reinforcement-learning/scripts/distill_policy.py --environment CartPole-v1 Acrobot-v1

The teacher is trained in the run, in OUTPUT_DIR/stages/teacher, unless --teacher names one. The control is the same
student trained by PPO from reward alone, with as many environment steps, rounded up to whole rollouts. For several
environments, the student has a head for each.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from kd.common.cli import parse, run, show_help
from kd.reinforcement_learning.student_model.arguments import DistillArguments, Loss, PolicyArguments, StudentArguments
from kd.reinforcement_learning.teacher_model.recipes import TeacherArguments, training_recipe

ARGUMENTS = (PolicyArguments, StudentArguments, DistillArguments, TeacherArguments)
if __name__ == "__main__":
    show_help(*ARGUMENTS)  # before the imports below, which take seconds

import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy
from torch import nn

from kd.common.training.run_folder import check_is_run_or_empty
from kd.common.utils.errors import UserError
from kd.reinforcement_learning.data.environment_ids import of_both, wrapped
from kd.reinforcement_learning.data.environments import (
    Environments,
    choose_threads,
    require_single_process,
    training_environments,
)
from kd.reinforcement_learning.data.specs import (
    fingerprint,
    import_modules,
    require_module_on_command_line,
    time_limit_warning,
)
from kd.reinforcement_learning.student_model.distillation import Distillation
from kd.reinforcement_learning.student_model.evaluation import (
    PolicyEvaluation,
    actor_parameters,
    evaluate,
    random_metrics,
    random_warning,
    report,
    return_warning,
)
from kd.reinforcement_learning.student_model.matching import check_loss
from kd.reinforcement_learning.student_model.student import (
    StudentSpec,
    new_student,
    validate_student,
    widths_of_share,
)
from kd.reinforcement_learning.teacher_model.files import environment_of
from kd.reinforcement_learning.teacher_model.policies import PolicyNetwork
from kd.reinforcement_learning.teacher_model.run import PolicyRun
from kd.reinforcement_learning.teacher_model.teacher import (
    Agent,
    Agents,
    Teacher,
    average_policies,
    columns_of_both,
    load_agent,
    soft_network,
    train_teachers,
)
from kd.reinforcement_learning.teacher_model.training import new_teacher


def main() -> None:
    require_single_process()
    args, student_args, distill_args, training = parse(*ARGUMENTS)
    notes = settle_environments(args)
    if len(args.environment) > 1 and student_args.student_share is not None:
        raise UserError("--student_share supports a single --environment: pass --student for several")
    students = settle_students(args, student_args)
    args.output_dir = args.output_dir or str(args.default_folder(students))
    check_is_run_or_empty(Path(args.output_dir))  # all checks precede the training of a teacher
    loss: Loss = "kl" if args.method == "ppd" else distill_args.loss
    for environment, student in zip(args.environment, students, strict=True):
        check_environment(environment, student, student_args, loss)
        notes += note_on_student(environment, student)

    choose_threads(*dict.fromkeys([*args.environment, *students]))
    loaded, untrained = load_teachers(args, loss), untrained_teachers(args, training)
    policies = [one[0].policy if (one := loaded[name]) else untrained[name].policy for name in args.environment]
    sized = args_of_share(student_args, args.environment[0], students[0], policies[0])
    if sized != student_args:
        notes += (f"--student_share {student_args.student_share:g}: the student has hidden layers of {sized.student}",)
        print(f"note: {notes[-1]}")

    run = PolicyRun(args.environment, args, student_args, distill_args, training)
    run.notes = notes
    networks = {
        f"teacher of {name}": nn.ModuleList(one.network() for one in agents) for name, agents in loaded.items()
    }
    run.check_inputs(", ".join(map(fingerprint, students)), **networks)
    for environment, agent in train_teachers(run, untrained, training).items():
        loaded[environment].insert(0, agent)
    teachers = [
        soft_teacher(name, student, loaded[name], args)
        for name, student in zip(args.environment, students, strict=True)
    ]
    measured = [measure_teacher(run, teacher, args, distill_args.steps) for teacher in teachers]
    for (evaluation, chance), stated in zip(measured, args.teacher_return or [], strict=False):
        run.warn(return_warning(evaluation.entry["name"], stated, evaluation.entry["metrics"]["test"], chance))

    specs = [StudentSpec(teacher, sized, training_recipe("ppo", teacher.environment)) for teacher in teachers]
    for seed_run in run.each_seed():
        train = Distillation(seed_run, specs, distill_args)
        agents: dict[str, Agents] = {}  # by role
        if not args.no_control:
            agents["control"] = train.control()
        agents["student"] = train.ppd_student(args.teacher_weight) if args.method == "ppd" else train.student()
        if not args.no_control:
            agents["behaviour_cloning"] = train.behaviour_cloning()
        if args.control_cpu_time:
            agents["control_cpu_time"] = train.control_of_equal_cpu_time()

        for spec, (teacher_evaluation, random), folder in zip(specs, measured, seed_run.reports, strict=True):
            teacher, evaluations = spec.teacher, {"teacher": teacher_evaluation}
            for role, by_environment in agents.items():
                agent = by_environment[spec.environment]
                evaluations[role] = evaluate([agent], teacher.shared, args.episodes, teacher=teacher.network)
            to = seed_run.folder / folder
            report(seed_run, args.method, spec.environment, evaluations, random, "student", to, teacher.environment)
    run.summarize()


def settle_environments(args: PolicyArguments) -> tuple[str, ...]:
    """Sets the environments to those of the teachers unless --environment names them, with arguments and wrappers.
    Returns notes about what was inferred, and prints them.
    """
    import_modules(args.import_module)
    chosen: Sequence[str | None] = args.environment or [None] * len(args.teacher)
    found = [environment_of(name, one, args) for name, one in zip(args.teacher, chosen, strict=True)]
    for name, one, (environment, _) in zip(args.teacher, chosen, found, strict=True):
        if one is None and environment is not None:
            require_module_on_command_line(environment, f"the training of {name}")
    args.environment = [environment or "CartPole-v1" for environment, _ in found]
    if len(set(args.environment)) != len(args.environment):
        raise UserError(f"several teachers have the environment {args.environment[0]}: pass --ensemble_teachers")
    notes = tuple(note for _, notes in found for note in notes)
    for note in notes:
        print(f"note: {note}")
    return notes


def settle_students(args: PolicyArguments, student: StudentArguments) -> list[str]:
    """The environments of the students: the teachers', unless the student observes otherwise."""
    view = student.view()
    if view and len(args.environment) > 1:
        raise UserError("--student_observation and --frame_stack support a single --environment: leave out the others")
    if view and args.method == "ppd":
        raise UserError(
            "--method ppd gives the student the teacher's observations: leave out --student_observation "
            "and --frame_stack, or use --method kd"
        )
    return [wrapped(environment, view) for environment in args.environment]


def check_environment(environment: str, student: str, args: StudentArguments, loss: Loss) -> None:
    """Raises UserError for environments, of teacher and student, that cannot be made, or that do not fit each other,
    the student or the loss.
    """
    require_module_on_command_line(environment, "the recipe")
    cure = "--student_observation on the command line if you trust it"
    require_module_on_command_line(student, "the recipe", cure)
    with closing(Environments(environment, 1)) as environments:
        actions, observations = environments.action_space, environments.observation_space
    if student != environment:
        with closing(Environments(student, 1)) as environments:
            changed, observations = environments.action_space, environments.observation_space
        if changed != actions:
            raise UserError(f"--student_observation changes the actions from {actions} to {changed}")
    validate_student(args, student, observations)
    check_loss(loss, actions)


def note_on_student(environment: str, student: str) -> tuple[str, ...]:
    """A note, which is printed, on a student that observes otherwise than its teacher."""
    if student == environment:
        return ()
    shapes = []
    for id in (student, environment):
        with closing(Environments(id, 1)) as environments:
            shapes.append(environments.observation_space.shape)
    note = f"the student observes {student}, of shape {shapes[0]}; the teacher {environment}, of shape {shapes[1]}"
    print(f"note: {note}")
    return (note,)


def load_teachers(args: PolicyArguments, loss: Loss) -> dict[str, list[Agent]]:
    """Loads the teachers of each environment: --teacher, unless it is `train`, and --ensemble_teachers. Raises
    UserError for a loss that a teacher does not support.
    """
    count, further = len(args.environment), args.ensemble_teachers
    environments, names = [*args.environment, *args.environment[:1] * len(further)], [*args.teacher, *further]
    statistics: Sequence[str | None] = args.vecnormalize or [None] * len(names)
    teachers: dict[str, list[Agent]] = {environment: [] for environment in args.environment}
    for number, (environment, name, vecnormalize) in enumerate(zip(environments, names, statistics, strict=True)):
        if number >= count or name != "train":
            agent = load_agent(name, environment, args.trust_pickle, vecnormalize)
            check_loss(loss, agent.policy.action_space, agent.deterministic)
            if agent.recurrent and (further or args.method == "ppd"):
                raise UserError(f"{name} is recurrent: leave out --ensemble_teachers, and use --method kd")
            teachers[environment].append(agent)
    return teachers


def untrained_teachers(args: PolicyArguments, training: TeacherArguments) -> dict[str, BaseAlgorithm]:
    """A new teacher for each environment whose --teacher is `train`."""
    return {
        environment: new_teacher(environment, training.recipe(environment), args.seed)
        for environment, name in zip(args.environment, args.teacher, strict=True)
        if name == "train"
    }


def soft_teacher(environment: str, student: str, agents: list[Agent], args: PolicyArguments) -> Teacher:
    """The teacher of an environment: its agents at their temperatures, averaged if there are several. `student`: the
    environment of the student.
    """
    networks = [soft_network(one, environment, args.teacher_temperature, args.teacher_entropy) for one in agents]
    if student != environment:
        for one, part in zip(agents, networks, strict=True):
            one.columns = part.columns = columns_of_both(one)[0]
    network = average_policies(networks, args.ensemble_weights) if len(agents) > 1 else networks[0]
    return Teacher(environment, tuple(agents), network, of_both(environment, student))


def measure_teacher(
    run: PolicyRun, teacher: Teacher, args: PolicyArguments, steps: int
) -> tuple[PolicyEvaluation, float]:
    """Returns the teacher's evaluation and the mean return of random actions; warns about a bad teacher.

    The curve of a teacher that is not trained in this run is constant from step 0 to `steps`: its mean return on the
    episodes of the students' curves.
    """
    environment = teacher.shared
    ensemble = teacher.network if len(teacher.agents) > 1 else None
    evaluation = evaluate(teacher.agents, environment, args.episodes, ensemble)
    log = run.history.setdefault("teacher", [])
    if not any(run.curve_name(environment) in entry for entry in log):
        validation = run.mean_returns({environment: teacher.network})
        log.extend({"environment_steps": step} | validation for step in (0, steps))
    random = random_metrics(environment, teacher.agent.policy.action_space, args.episodes)
    run.warn(time_limit_warning(teacher.environment))
    for agent in teacher.agents:
        for warning in agent.warnings:
            run.warn(warning)
    entry = evaluation.entry
    run.warn(random_warning(entry["name"], entry["metrics"]["test"], random))
    return evaluation, random["return_mean"]


def args_of_share(args: StudentArguments, environment: str, observed: str, teacher: BasePolicy) -> StudentArguments:
    """The arguments with the widths of --student_share, if it is set. `observed`: the environment of the student."""
    if args.student_share is None:
        return args
    network = PolicyNetwork(teacher)
    with closing(Environments(environment, 1, memory=network.memory)) as environments:
        size = actor_parameters(network, torch.as_tensor(environments.observations))
    recipe = training_recipe("ppo", environment)
    with closing(training_environments(observed, recipe.environments, seed=0)) as environments:
        student = new_student(environments, args, recipe, seed=0).policy
    assert isinstance(student.action_net, nn.Linear)
    widths = widths_of_share(args.student_share, size, student.features_dim, student.action_net.out_features)
    return replace(args, student=widths, student_share=None)


if __name__ == "__main__":
    run(main)
