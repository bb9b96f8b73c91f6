"""Exports a student of any domain: one file that needs nothing of this project, and the code that loads it.

    python -m kd.common.export runs/NLP/base --format onnx
    python -m kd.common.export runs/reinforcement-learning/distill_CartPole-v1 --format torch.export --output_dir cart

The folder (default: `export` in the run's) holds model.onnx or model.pt2, what its use needs (tokenizer, labels), the
code in README.md and the comparison with the student in export.json. The file is loaded again and must give the
student's outputs, for inputs of other sizes than those that it was traced with, or nothing is written. All of it runs
on the CPU.
"""

import inspect
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from kd.common.cli import Parser, run
from kd.common.export.exportable import FORMATS, Exportable, export_student, output_folder, run_of
from kd.common.reporting.results import RESULTS
from kd.common.utils import import_name
from kd.common.utils.errors import UserError
from kd.common.utils.files import read_json

MODULE_TASK = re.compile(r"[^/:]+:.*", re.DOTALL)  # owner/name:config is a dataset


def main() -> None:
    parser = Parser(prog="python -m kd.common.export", description=__doc__)
    parser.add_argument("student", help="folder of a student or of its run, or a zip of Stable-Baselines3")
    parser.add_argument("--format", choices=list(FORMATS), default="onnx")
    parser.add_argument("--domain", help="domain of the student, where its run has no results.json that names it")
    parser.add_argument("--task", help="task of the student, likewise; of a policy, the environment")
    parser.add_argument("--vecnormalize", metavar="FILE", help="of a policy: file of VecNormalize.save, or none")
    parser.add_argument("--output_dir", help="default: export, in the folder of the run or next to the student")
    parser.add_argument("--overwrite_output_dir", action="store_true", help="replace an earlier export")
    args = parser.parse_args()

    path = Path(args.student, "student")
    name = str(path) if path.is_dir() else args.student
    folder = output_folder(name, args.output_dir, args.overwrite_output_dir)
    origin = run_of(name)
    results = read_json(origin / RESULTS) if origin else {}
    if not isinstance(results, dict):
        raise UserError(f"{origin}/{RESULTS} is damaged: it holds no results")
    load = loader(name, args.domain or results.get("domain"))
    task = args.task or task_without_module(results.get("task"), origin)
    transformers_logging.disable_progress_bar()
    statistics = {"vecnormalize": args.vecnormalize} if args.vecnormalize else {}
    if statistics and "vecnormalize" not in inspect.signature(load).parameters:
        raise UserError(f"--vecnormalize is for policies, and {name} is none: leave it out")
    export_student(name, load(name, task, **statistics), args.format, folder)


def task_without_module(task: Any, origin: Path | None) -> str | None:
    """The task of a run. Raises UserError for one of Gymnasium's `module:id`, whose module would be imported: code
    runs only where the command line names it.
    """
    if not isinstance(task, str):
        return None
    if MODULE_TASK.fullmatch(task):
        raise UserError(
            f"{origin} is about {task}, whose module would be imported: pass --task {task} where you trust that module"
        )
    return task


def loader(student: str, domain: str | None) -> Callable[..., Exportable]:
    """The function of a domain that loads its students. Raises UserError where there is none."""
    folders = [path.parts[-3] for path in Path(__file__).parents[2].glob("*/student_model/exportable.py")]
    known = f"--domain, one of {', '.join(sorted(folders))}"
    if not isinstance(domain, str):
        raise UserError(f"no {RESULTS} of {student} names its domain: pass {known}")
    package = import_name(domain)
    if package not in map(import_name, folders):
        raise UserError(f"there is no domain {domain} with students to export: pass {known}")
    return import_module(f"kd.{package}.student_model.exportable").load


if __name__ == "__main__":
    run(main)
