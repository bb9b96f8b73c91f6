"""Trains a Stable-Baselines3 teacher from reward, with tuned hyper-parameters for its environment.

    python reinforcement-learning/scripts/train_teacher.py
    python reinforcement-learning/scripts/train_teacher.py --environment Pendulum-v1 --algorithm sac
    python reinforcement-learning/scripts/train_teacher.py --environment ALE/Pong-v5 --teacher_steps 100000

Pass the folder of the run as --teacher to distill_policy.py, which finds the default folder without the flag.
"""

from kd.common.cli import parse, reject_unused, run, show_help
from kd.common.training.arguments import RunArguments
from kd.reinforcement_learning.teacher_model.recipes import TeacherArguments, TeacherTask

ARGUMENTS = (TeacherTask, TeacherArguments, RunArguments)
if __name__ == "__main__":
    show_help(*ARGUMENTS)  # before the imports below, which take seconds

from kd.common.training.run import Run
from kd.common.utils.errors import UserError
from kd.reinforcement_learning.data.environments import (
    require_module_on_command_line,
    require_single_process,
    time_limit_warning,
)
from kd.reinforcement_learning.student_model.evaluation import evaluate, random_metrics, random_warning, report
from kd.reinforcement_learning.teacher_model.teacher import train_teacher
from kd.reinforcement_learning.teacher_model.training import new_teacher


def main() -> None:
    require_single_process()
    task, training, args = parse(*ARGUMENTS)
    if args.seeds:
        raise UserError("train_teacher.py trains a single teacher: pass --seed instead of --seeds")
    reject_unused("train_teacher.py trains no student", args, "margin")
    environment = task.environment
    require_module_on_command_line(environment, "the recipe")
    args.output_dir = args.output_dir or str(training.folder(environment))

    model = new_teacher(environment, training.recipe(environment), args.seed)  # fails before the folder is made
    run = Run(args, task, training)
    teacher = train_teacher(run, model, task, training)

    evaluation = evaluate([teacher], environment, task.episodes)
    random = random_metrics(environment, teacher.policy.action_space, task.episodes)
    run.warn(time_limit_warning(environment))
    run.warn(random_warning(teacher.name, evaluation.entry["metrics"]["test"], random))
    report(run, f"{training.algorithm} teacher", environment, {"teacher": evaluation}, random["return_mean"])


if __name__ == "__main__":
    run(main)
