"""Distills a Stable-Baselines3 teacher into a small PPO student, with a control and a behaviour-cloning baseline.

    python reinforcement-learning/scripts/distill_policy.py
    python reinforcement-learning/scripts/distill_policy.py --student 7 --student_value --seeds 0 1 2 3 4
    python reinforcement-learning/scripts/distill_policy.py --environment LunarLander-v3 --teacher lander.zip
    python reinforcement-learning/scripts/distill_policy.py --environment CartPole-v1 Acrobot-v1

The control is the same student trained by PPO from reward alone, with as many environment steps, rounded up to whole
rollouts. Of several environments one body is distilled with a head for each; each environment gets a report and an
ordinary student.
"""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

from kd.common.cli import parse, run
from kd.common.reporting.comparison import compare
from kd.common.training.run_folder import RunFolder, check_is_run_or_empty
from kd.reinforcement_learning.environments.launch import require_module_on_command_line, require_single_process
from kd.reinforcement_learning.environments.vector import Environments
from kd.reinforcement_learning.student_model.arguments import ExperimentArguments, StudentArguments, TeacherTraining
from kd.reinforcement_learning.student_model.distillation import Distillation
from kd.reinforcement_learning.student_model.distiller import DistillArguments
from kd.reinforcement_learning.student_model.evaluation import evaluate
from kd.reinforcement_learning.student_model.experiment import Experiment, fingerprint, folder_name
from kd.reinforcement_learning.student_model.matching import Loss, check_loss
from kd.reinforcement_learning.student_model.subject import Subject
from kd.reinforcement_learning.student_model.teachers import soft_network, teacher_of
from kd.reinforcement_learning.teacher_model.recipes import training_recipe


def main() -> None:
    require_single_process()
    args, student, distill, training = parse(ExperimentArguments, StudentArguments, DistillArguments, TeacherTraining)
    if args.output_dir is None:
        names = "+".join(map(folder_name, args.environment))
        args.output_dir = f"runs/reinforcement-learning/{args.method}_{names}"
    check_is_run_or_empty(Path(args.output_dir))  # before a teacher is trained, as what follows
    loss: Loss = "kl" if args.method == "ppd" else distill.loss
    for environment in args.environment:
        require_module_on_command_line(environment, "the recipe")
        with closing(Environments(environment, 1)) as shown:
            student.check(environment, shown.observation_space)
            check_loss(loss, shown.action_space)
    files = args.vecnormalize or [None] * len(args.environment)
    subjects = [
        subject_of(*own, args, student, training) for own in zip(args.environment, args.teacher, files, strict=True)
    ]
    for subject in subjects:
        check_loss(loss, subject.teacher.policy.action_space, subject.deterministic)
    seeds = args.seeds or [args.seed]
    held = RunFolder(Path(args.output_dir)) if args.seeds else None
    folders = []
    for seed in seeds:
        folder = Path(args.output_dir, f"seed{seed}") if args.seeds else Path(args.output_dir)
        own = replace(args, seed=seed, seeds=None, output_dir=str(folder))
        folders += run_seed(own, subjects, student, distill, training)
    if len(seeds) > 1:
        compare(folders)
    del held  # until now no other process works in the folder of the seeds


def subject_of(
    environment: str,
    name: str,
    vecnormalize: str | None,
    args: ExperimentArguments,
    student: StudentArguments,
    training: TeacherTraining,
) -> Subject:
    teacher = teacher_of(environment, name, training, args, vecnormalize)
    network = soft_network(teacher, environment, args.teacher_temperature, args.teacher_entropy)
    return Subject(environment, teacher, network, training_recipe("ppo", environment), student)


def run_seed(
    args: ExperimentArguments,
    subjects: list[Subject],
    student: StudentArguments,
    distill: DistillArguments,
    training: TeacherTraining,
) -> list[Path]:
    """One seed's run; the folders of its reports."""
    names = [folder_name(subject.environment) for subject in subjects] if len(subjects) > 1 else []
    experiment = Experiment(args.method, args, args.watch_episodes, student, distill, training, folders=names)
    played = ", ".join(fingerprint(subject.environment) for subject in subjects)
    experiment.run.check_inputs(played, **{f"teacher of {s.environment}": s.network for s in subjects})
    for warning in [warning for subject in subjects for warning in subject.warnings(args.episodes)]:
        experiment.run.warn(warning)
    stages = Distillation(experiment, subjects, distill)
    agents = {"student": stages.proximal(args.teacher_weight) if args.method == "ppd" else stages.distilled()}
    if not args.no_control:
        agents |= {"control": stages.from_reward(), "behaviour_cloning": stages.behaviour_cloning()}
    folders = []
    for subject in subjects:
        name = subject.environment
        folders.append(experiment.run.folder / folder_name(name) if names else experiment.run.folder)
        models = {"teacher": subject.entry(args.episodes)}
        models |= {role: evaluate(of[name], name, args.episodes, subject.network) for role, of in agents.items()}
        work = stages.work("student")
        random = subject.random_metrics(args.episodes)["return_mean"]
        experiment.report(name, models, random, "student", folders[-1], work)
    return folders


if __name__ == "__main__":
    run(main)
