"""Trains a Stable-Baselines3 teacher from reward, with tuned hyper-parameters for its environment.

    python reinforcement-learning/scripts/train_teacher.py
    python reinforcement-learning/scripts/train_teacher.py --environment Pendulum-v1 --algorithm sac
    python reinforcement-learning/scripts/train_teacher.py --environment ALE/Pong-v5 --teacher_steps 100000

The run's folder is what `--teacher` of distill_policy.py takes; without one that script looks where this puts it.
"""

from kd.common.cli import parse, run
from kd.common.training.arguments import RunArguments
from kd.reinforcement_learning.environments.launch import require_module_on_command_line, require_single_process
from kd.reinforcement_learning.environments.vector import time_limit_warning
from kd.reinforcement_learning.student_model.arguments import TeacherTask, TeacherTraining
from kd.reinforcement_learning.student_model.evaluation import evaluate, random_metrics, random_warning
from kd.reinforcement_learning.student_model.teachers import trained_teacher


def main() -> None:
    require_single_process()
    task, training, args = parse(TeacherTask, TeacherTraining, RunArguments)
    require_module_on_command_line(task.environment, "the recipe")
    experiment, teacher = trained_teacher(task, training, args)
    entry = evaluate(teacher, task.environment, task.episodes)
    random = random_metrics(task.environment, teacher.policy.action_space, task.episodes)
    experiment.run.warn(time_limit_warning(task.environment))
    experiment.run.warn(random_warning(teacher.name, entry["metrics"]["test"], random))
    experiment.report(task.environment, {"teacher": entry}, random["return_mean"])


if __name__ == "__main__":
    run(main)
