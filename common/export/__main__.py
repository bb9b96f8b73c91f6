"""Takes a student of any domain away: one file that needs nothing of this project, and the code that loads it.

    python -m kd.common.export runs/NLP/base --format onnx
    python -m kd.common.export runs/reinforcement-learning/distill_CartPole-v1 --format torch.export --output_dir cart

The folder (default: `export` in the run's) holds model.onnx or model.pt2, what its use needs (tokenizer, labels), the
code in README.md and what was checked in export.json. The file is loaded again and has to answer as the student does,
to inputs of other sizes than those that it was made with, or nothing is written. All of it runs on the CPU.
"""

import inspect
import re
import shlex
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import onnxruntime
from torch import Tensor
from transformers.utils import logging as transformers_logging

from kd.common.cli import Parser, run
from kd.common.export.exportable import Check, Exportable, check_table, checks, sizes
from kd.common.export.onnx import OnnxModel, axes_by_input, load_program, to_onnx, to_program
from kd.common.reporting.results import RESULTS
from kd.common.reporting.tables import markdown, print_rich
from kd.common.utils import import_name
from kd.common.utils.devices import command, environment
from kd.common.utils.errors import UserError
from kd.common.utils.files import read_json, write_json, write_text
from kd.common.utils.folders import writing_folder

MODULE_TASK = re.compile(r"[^/:]+:.*", re.DOTALL)  # owner/name:config is a dataset
RECORD = "export.json"  # every export has it, and nothing else
LOAD_ONNX = """import onnxruntime

folder = "{folder}"  # where this lies
session = onnxruntime.InferenceSession(f"{{folder}}/{file}")


def model(inputs):
    return session.run(None, inputs)[0]"""
LOAD_PROGRAM = """import torch

folder = "{folder}"  # where this lies
program = torch.export.load(f"{{folder}}/{file}").module()


def model(inputs):  # in the order of the table above
    with torch.inference_mode():
        return program(*map(torch.from_numpy, inputs.values())).numpy()"""


def load_torch(path: Path) -> Callable[..., Tensor]:
    program = load_program(path)
    return lambda **inputs: program(*inputs.values())


class Format(NamedTuple):
    """How a student is written and loaded again, here and by the reader of README.md."""

    file: str
    write: Callable[[Exportable, Path], None]
    load: Callable[[Path], Callable[..., Tensor]]
    code: str
    note: str


FORMATS = {
    "onnx": Format(
        "model.onnx",
        lambda student, path: to_onnx(student.model, student.inputs, path, student.axes, student.output),
        lambda path: OnnxModel(path).answer,
        LOAD_ONNX,
        "It was checked with ONNX Runtime {onnxruntime}",
    ),
    "torch.export": Format(
        "model.pt2",
        lambda student, path: to_program(student.model, student.inputs, path, student.axes),
        load_torch,
        LOAD_PROGRAM,
        "torch {torch} wrote it, and other versions may not read it",
    ),
}


def main() -> None:
    parser = Parser(prog="python -m kd.common.export", description=__doc__)
    parser.add_argument("student", help="folder of a student or of its run, or a zip of Stable-Baselines3")
    parser.add_argument("--format", choices=list(FORMATS), default="onnx")
    parser.add_argument("--domain", help="whose student it is, where no results.json of its run says so")
    parser.add_argument("--task", help="what it is for, likewise; of a policy, the environment")
    parser.add_argument("--vecnormalize", metavar="FILE", help="of a policy: what VecNormalize.save wrote, or none")
    parser.add_argument("--output_dir", help="default: export, in the folder of the run or beside the student")
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
    take_away(name, load(name, task, **statistics), args.format, folder)


def take_away(name: str, student: Exportable, format: str, folder: Path) -> None:
    """Writes `student`, called `name`, into a folder, and prints what was checked. Raises UserError where it cannot be
    exported, or its export answers otherwise.
    """
    kind = FORMATS[format]
    with writing_folder(folder) as partial:
        try:
            kind.write(student, partial / kind.file)
        except Exception as error:  # whatever the exporters raise about a model that they cannot follow
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"{name} cannot be exported as {format} ({type(error).__name__}: {reason})") from error
        found = checks(name, student, kind.load(partial / kind.file))
        student.beside(partial)
        record = {
            "student": name,
            "format": format,
            "tolerance": student.tolerance,
            "checks": [asdict(check) for check in found],
            "command": ["python", "-m", "kd.common.export", *command()[2:]],
            "environment": environment("fp32", "cpu") | {"onnxruntime": onnxruntime.__version__},
        }
        write_json(partial / RECORD, record)
        write_text(partial / "README.md", readme(record, student, found, folder))
    print_rich(*check_table(found, student.output), title=f"{name}, exported", below=f"export: {folder}")


# ---------------------------------------------------------------- where from, where to


def run_of(student: str) -> Path | None:
    """The folder of the run that a student, or a zip in its folder, belongs to."""
    path = Path(student).resolve()
    return next((folder for folder in (path, *path.parents[:2]) if (folder / RESULTS).is_file()), None)


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
        raise UserError(f"no {RESULTS} beside {student} says whose it is: pass {known}")
    package = import_name(domain)
    if package not in map(import_name, folders):
        raise UserError(f"there is no domain {domain} that students can be taken from: pass {known}")
    return import_module(f"kd.{package}.student_model.exportable").load


def output_folder(student: str, output_dir: str | None, overwrite: bool) -> Path:
    """Where an export goes, once it is certain that nothing else is lost there."""
    path = Path(student).resolve()
    if not output_dir and not path.exists():
        raise UserError(f"{student} is no folder or file: name a student's, or pass --output_dir for one of the Hub")
    folder = Path(output_dir or (run_of(student) or path.parent) / "export")
    if folder.exists() and not (folder / RECORD).exists():
        raise UserError(f"{folder} holds something else than an export: choose another --output_dir")
    if folder.exists() and not overwrite:
        raise UserError(f"{folder} holds an export: replace it with --overwrite_output_dir, or choose --output_dir")
    return folder


# ---------------------------------------------------------------- what is told of it


def readme(record: dict[str, Any], student: Exportable, found: list[Check], folder: Path) -> str:
    kind, axes = FORMATS[record["format"]], axes_by_input(student.inputs, student.axes)
    inputs = [
        [
            name,
            str(value.dtype).removeprefix("torch."),
            sizes([axes[name].get(i, n) for i, n in enumerate(value.shape)]),
        ]
        for name, value in student.inputs.items()
    ]
    ties = f", but for {student.tied:.1%} of the rows, where two keys are equally near" if student.tied else ""
    sections = [
        f"# {record['student']}, exported",
        f"`{kind.file}` takes, in this order,",
        markdown(["input", "type", "size"], inputs),
        f"and answers with `{student.output}`. It was loaded and compared with the student on inputs of these sizes; "
        f"the tolerance is {student.tolerance:g}{ties}.",
        markdown(*check_table(found, student.output)),
        "## Load it",
        f"```python\n{kind.code.format(folder=folder, file=kind.file)}\n```",
        f"This needs no code of the project that made it. {kind.note.format(**record['environment'])}.",
        "## Use it",
        f"```python\n{student.usage.strip()}\n```",
        "## How it was made",
        f"```\n{shlex.join(record['command'])}\n```",
    ]
    return "\n\n".join(sections) + "\n"


if __name__ == "__main__":
    run(main)
