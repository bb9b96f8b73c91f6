"""Trains a Stable-Baselines3 teacher from reward, with tuned hyper-parameters for its environment.

    python reinforcement-learning/scripts/train_teacher.py
    python reinforcement-learning/scripts/train_teacher.py --environment Pendulum-v1 --algorithm sac
    python reinforcement-learning/scripts/train_teacher.py --environment ALE/Pong-v5 --teacher_steps 100000

Pass the folder of the run as --teacher to distill_policy.py.
"""

from kd.common.cli import parse, reject_unused, run, show_help
from kd.reinforcement_learning.teacher_model.recipes import PolicyRunArguments, TeacherArguments, TeacherTask

ARGUMENTS = (TeacherTask, TeacherArguments, PolicyRunArguments)
if __name__ == "__main__":
    show_help(*ARGUMENTS)  # before the imports below, which take seconds

from kd.common.utils.errors import UserError
from kd.reinforcement_learning.data.environments import choose_threads, require_single_process
from kd.reinforcement_learning.data.specs import (
    fingerprint,
    import_modules,
    require_module_on_command_line,
    time_limit_warning,
)
from kd.reinforcement_learning.student_model.evaluation import evaluate, random_metrics, random_warning, report
from kd.reinforcement_learning.teacher_model.files import environment_of
from kd.reinforcement_learning.teacher_model.run import PolicyRun
from kd.reinforcement_learning.teacher_model.teacher import train_teachers
from kd.reinforcement_learning.teacher_model.training import new_teacher


def main() -> None:
    require_single_process()
    task, training, args = parse(*ARGUMENTS)
    if args.seeds:
        raise UserError("train_teacher.py trains a single teacher: pass --seed instead of --seeds")
    reject_unused("train_teacher.py trains no student", args, "margin")
    import_modules(args.import_module)
    found, notes = environment_of("train", task.environment, args)
    environment = task.environment = found or task.environment
    for note in notes:
        print(f"note: {note}")
    require_module_on_command_line(environment, "the recipe")
    args.output_dir = args.output_dir or str(training.folder(environment))
    choose_threads(environment)

    model = new_teacher(environment, training.recipe(environment), args.seed)  # fails before the folder is made
    run = PolicyRun([environment], args, task, training)
    run.notes = tuple(notes)
    run.check_inputs(fingerprint(environment))
    teacher = train_teachers(run, {environment: model}, training)[environment]

    evaluation = evaluate([teacher], environment, args.episodes)
    random = random_metrics(environment, teacher.policy.action_space, args.episodes)
    run.warn(time_limit_warning(environment))
    run.warn(random_warning(teacher.name, evaluation.entry["metrics"]["test"], random))
    report(run, f"{training.algorithm} teacher", environment, {"teacher": evaluation}, random["return_mean"])


if __name__ == "__main__":
    run(main)
