"""Exports a student of any domain to one file, with the code that loads it.

    python -m kd.common.export runs/NLP/base --format onnx
    python -m kd.common.export runs/reinforcement-learning/distill_CartPole-v1 --format torch.export --output_dir cart
    python -m kd.common.export runs/image-classification/counted --format torch-int8

Writes model.onnx or model.pt2, which do not need this project, or model_int8.safetensors, which does: an image
classifier with int8 linear layers and values of a bottleneck. Also writes the files for its use (tokenizer, labels),
the code that loads it (README.md) and the comparison with the student (export.json), by default into the folder
`export` of the run. The exported file is loaded again and must reproduce the student's outputs for inputs of other
sizes than the traced example, up to the rounding of int8; otherwise nothing is written. Everything runs on the CPU.
"""

import inspect
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from kd.common.cli import Parser, run, show_help

PARSER = Parser(prog="python -m kd.common.export", description=__doc__)
PARSER.add_argument("student", help="Folder of a student or of its run, or a zip file of Stable-Baselines3.")
PARSER.add_argument(
    "--format", choices=["onnx", "torch.export", "torch-int8"], default="onnx", help="File format of the export."
)
PARSER.add_argument("--domain", help="Domain of the student. Default: read from results.json of its run.")
PARSER.add_argument("--task", help="Task, or environment of a policy. Default: read from results.json.")
PARSER.add_argument("--vecnormalize", metavar="FILE", help="File of VecNormalize.save for a policy, or none.")
PARSER.add_argument("--import_module", metavar="MODULE", help="Module that defines the student's network.")
PARSER.add_argument("--output_dir", help="Folder of the export. Default: export, in the run folder or by the student.")
PARSER.add_argument("--overwrite_output_dir", action="store_true", help="Replace an earlier export.")
if __name__ == "__main__":
    show_help(parser=PARSER)  # before the imports below, which take seconds


from kd.common.export.exportable import Exportable, export_student, output_folder, run_of
from kd.common.reporting.results import RESULTS
from kd.common.utils import import_name
from kd.common.utils.errors import UserError
from kd.common.utils.files import read_json
from kd.common.utils.modules import import_named

# Of an environment or one of its wrappers; owner/name:config is a dataset.
MODULE_TASK = re.compile(r"(.*\+)?(?!gymnasium\.wrappers:)[\w.]+:.*", re.DOTALL)


def main() -> None:
    args = PARSER.parse_args()
    if args.import_module:
        import_named(args.import_module, args.student)
    path = Path(args.student, "student")
    name = str(path) if path.is_dir() else args.student
    folder = output_folder(name, args.output_dir, args.overwrite_output_dir)
    run_folder = run_of(name)
    results = read_json(run_folder / RESULTS) if run_folder else {}
    if not isinstance(results, dict):
        raise UserError(f"{run_folder}/{RESULTS} is damaged: it holds no results")
    load = loader(name, args.domain or results.get("domain"))
    task = args.task or task_of(results.get("task"), run_folder)
    statistics = {"vecnormalize": args.vecnormalize} if args.vecnormalize else {}
    if statistics and "vecnormalize" not in inspect.signature(load).parameters:
        raise UserError(f"--vecnormalize is for policies, and {name} is not a policy: leave it out")
    export_student(name, load(name, task, **statistics), args.format, folder)


def task_of(task: Any, run_folder: Path | None) -> str | None:
    """The task of a run. Raises UserError for Gymnasium's `module:id`, which imports the module: code runs only if the
    command line names it.
    """
    if not isinstance(task, str):
        return None
    if MODULE_TASK.fullmatch(task):
        raise UserError(
            f"the task of {run_folder} is {task}, which imports a module: pass --task {task} if you trust that module"
        )
    return task


def loader(student: str, domain: str | None) -> Callable[..., Exportable]:
    """The function of a domain that loads its students. Raises UserError if there is none."""
    folders = [path.parts[-3] for path in Path(__file__).parents[2].glob("*/student_model/exportable.py")]
    known = f"--domain, one of {', '.join(sorted(folders))}"
    if not isinstance(domain, str):
        raise UserError(f"no {RESULTS} names the domain of {student}: pass {known}")
    package = import_name(domain)
    if package not in map(import_name, folders):
        raise UserError(f"there is no domain {domain} with exportable students: pass {known}")
    return import_module(f"kd.{package}.student_model.exportable").load


if __name__ == "__main__":
    run(main)
