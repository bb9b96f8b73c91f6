"""Evaluates a policy: mean, IQM and 95 % interval of its returns, its cost, and its agreement with a teacher.

    python reinforcement-learning/scripts/evaluate.py runs/reinforcement-learning/distill_CartPole-v1
    python reinforcement-learning/scripts/evaluate.py student.zip --environment CartPole-v1 --teacher teacher.zip
    python reinforcement-learning/scripts/evaluate.py runs/reinforcement-learning/distill_CartPole-v1 --video cart.mp4
    python reinforcement-learning/scripts/evaluate.py runs/reinforcement-learning/distill_CartPole-v1 \\
        --predictions episodes.csv

MODEL is a run, a zip of Stable-Baselines3, a folder or owner/name on the Hub, like --teacher of distill_policy.py. Of
several seeds, the student of the first one is evaluated; RUN/seed1 names that of another.
"""

import sys
from argparse import Namespace
from pathlib import Path

from kd.common.cli import Parser, run, show_help
from kd.common.training.arguments import add_evaluation_arguments
from kd.common.utils.ranges import MOST, Range
from kd.reinforcement_learning.teacher_model.recipes import EnvironmentArguments

PARSER = Parser([EnvironmentArguments], description=__doc__)
add_evaluation_arguments(
    PARSER,
    "a zip of Stable-Baselines3, a folder with one, or owner/name on the Hub",
    "the return and length of each episode",
)
PARSER.add_argument("--environment", help="Gymnasium id of the environment (default: that of the run or agent).")
PARSER.add_argument("--teacher", help="Policy to compare with, in the states that the model visits.")
PARSER.add_argument(
    "--vecnormalize",
    metavar="FILE",
    help="VecNormalize file of the model, or none (default: the file named like the model).",
)
PARSER.add_argument(
    "--teacher_vecnormalize",
    metavar="FILE",
    help="VecNormalize file of the teacher, or none (default: the file named like the teacher).",
)
PARSER.add_argument("--episodes", type=int, default=100, within=Range(1, MOST), help="Number of episodes to play.")
PARSER.add_argument("--video", metavar="FILE", help="Write a video of one episode to this .mp4 or .gif.")
PARSER.add_argument(
    "--trust_pickle", action="store_true", help="Let Stable-Baselines3 unpickle the model, which can run any code."
)
if __name__ == "__main__":
    show_help(parser=PARSER)  # before the imports below, which take seconds

from kd.common.reporting.results import RESULTS
from kd.common.reporting.saved_models import check_files, print_seeds, show_metrics, write_predictions
from kd.common.utils.errors import UserError
from kd.common.utils.files import read_json
from kd.reinforcement_learning.data.environment_ids import of_both
from kd.reinforcement_learning.data.environments import choose_threads, require_single_process
from kd.reinforcement_learning.data.rollouts import TEST_SEED, in_one_episode
from kd.reinforcement_learning.data.specs import import_modules, require_module_on_command_line, time_limit_warning
from kd.reinforcement_learning.data.video import check_video, write_video
from kd.reinforcement_learning.student_model.evaluation import evaluate
from kd.reinforcement_learning.teacher_model.files import environment_of
from kd.reinforcement_learning.teacher_model.policies import greedy, memory_of
from kd.reinforcement_learning.teacher_model.teacher import columns_of_both, load_agent


def main() -> None:
    require_single_process()
    args = PARSER.parse_args()
    check_files(args)
    if args.video:
        check_video(args.video)
    environment, teacher_environment = settle_environments(args)
    choose_threads(environment)
    agent = load_agent(args.model, environment, args.trust_pickle, args.vecnormalize)
    teacher, shared = None, environment
    if args.teacher:
        flag = "--teacher_vecnormalize"
        teacher = load_agent(args.teacher, teacher_environment, args.trust_pickle, args.teacher_vecnormalize, flag)
        if (shared := of_both(teacher_environment, environment)) != environment:
            teacher.columns, agent.columns = columns_of_both(teacher)
        elif teacher.recurrent or agent.recurrent:  # the state of one follows the observations of both
            teacher.columns = agent.columns = slice(0, None)
        if teacher.recurrent and agent.recurrent:
            raise UserError(f"{args.model} and {args.teacher} are both recurrent: leave out --teacher")
    for warning in (time_limit_warning(environment), *agent.warnings, *(teacher.warnings if teacher else ())):
        if warning:
            print(f"warning: {warning}", file=sys.stderr)

    print_seeds(Path(args.model))
    entry, _, played = evaluate([agent], shared, args.episodes, teacher=teacher.network() if teacher else None)
    show_metrics(args.model, entry, args.json)
    rows = {"episode": range(args.episodes), "return": played.returns.tolist(), "length": played.lengths.tolist()}
    write_predictions(args.predictions, {"test": rows})
    if args.video:
        act = in_one_episode(greedy(agent.network()), memory_of(agent.network()))
        print(f"video: {write_video(act, shared, args.video, TEST_SEED)}")


def settle_environments(args: Namespace) -> tuple[str, str]:
    """The environment of --environment, of a run, or of the training of the model, with arguments and wrappers; and
    that of its teacher, which differs if the run has a student that observes otherwise.
    """
    import_modules(args.import_module)
    chosen, teacher_environment = (
        (args.environment, None) if args.environment else environments_of_run(Path(args.model))
    )
    arguments = EnvironmentArguments(args.import_module, args.env_kwargs, args.wrapper)
    environment, notes = environment_of(args.model, chosen, arguments)
    if environment is None:
        raise UserError(
            f"the environment of {args.model} is unknown: pass --environment, such as --environment CartPole-v1"
        )
    require_module_on_command_line(environment, f"the training of {args.model}")
    for note in notes:
        print(f"note: {note}")
    return environment, teacher_environment if teacher_environment and chosen == environment else environment


def environments_of_run(folder: Path) -> tuple[str | None, str | None]:
    """The environment of a run of this project, and that of its teacher if it differs. Raises UserError if
    results.json names a module to import.
    """
    for place in (folder, folder.parent):
        if (place / RESULTS).exists():
            results = read_json(place / RESULTS)
            task = results.get("task") if isinstance(results, dict) else None
            if not isinstance(task, str):
                raise UserError(f"{place / RESULTS} is damaged: pass --environment, such as --environment CartPole-v1")
            require_module_on_command_line(task, str(place / RESULTS))
            return task, results.get("teacher_environment")
    return None, None


if __name__ == "__main__":
    run(main)
