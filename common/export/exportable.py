"""Exports a student to one file that needs nothing of this project, and compares it with the student.

Each domain describes its students by one function, `load(name, task) -> Exportable`, in its
`student_model/exportable.py`.
"""

import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from kd.common.bottleneck.module import DiscreteKeyValueBottleneck
from kd.common.export.onnx import Axes, OnnxModel, axes_by_input, get_logits, load_program, to_onnx, to_program
from kd.common.reporting.results import RESULTS
from kd.common.reporting.tables import markdown, print_rich
from kd.common.utils.devices import command, environment
from kd.common.utils.errors import UserError
from kd.common.utils.files import write_json, write_text, writing_folder

RECORD = "export.json"  # every export has it, and nothing else
TOLERANCE = 1e-3  # of a logit, so a prediction may only change where the two largest are closer than twice that
TIES = 1e-3  # share of rows beyond it with a bottleneck: where two keys are equally near, rounding decides


@dataclass
class Exportable:
    """A student, example inputs, and code that uses it.

    model: in eval mode on the CPU; `model(**inputs)` returns a tensor (batch, ...), or logits.
    inputs: the example that is traced, by name, each (batch, ...), with 2 or more along `axes`.
    test_inputs: what the export is compared on: inputs of other sizes than the example along all of `axes`.
    axes: those whose size may change, as of `kd.common.export.onnx.to_onnx`.
    usage: Python that continues after `folder` and `model(inputs)`, from arrays by name to one array, are defined;
        needs nothing of this project.
    output: name of the output.
    write_files: writes the files that `usage` reads into a folder.
    reference: what the export is compared with; the model itself, unless the student comes from another library.
    tolerance: largest absolute difference of an output.

    Raises ValueError where `test_inputs` have no other size along some axis.
    """

    model: nn.Module
    inputs: dict[str, Tensor]
    test_inputs: list[dict[str, Tensor]]
    axes: Axes | dict[str, Axes]
    usage: str
    output: str = "logits"
    write_files: Callable[[Path], Any] = lambda folder: None
    reference: Callable[..., Tensor] | None = None
    tolerance: float = TOLERANCE

    def __post_init__(self) -> None:
        for name, axes in axes_by_input(self.inputs, self.axes).items():
            for axis, meaning in axes.items():
                if {other[name].shape[axis] for other in self.test_inputs} <= {self.inputs[name].shape[axis]}:
                    raise ValueError(f"no other size of {name}'s {meaning} is tried")

    @torch.no_grad()
    def predict(self, inputs: dict[str, Tensor]) -> Tensor:
        """The output of the student itself."""
        return get_logits((self.reference or self.model)(**inputs))


# ---------------------------------------------------------------- formats

LOAD_ONNX = """import onnxruntime

folder = "{folder}"  # this folder
session = onnxruntime.InferenceSession(f"{{folder}}/{file}")


def model(inputs):
    return session.run(None, inputs)[0]"""
LOAD_PROGRAM = """import torch

folder = "{folder}"  # this folder
program = torch.export.load(f"{{folder}}/{file}").module()


def model(inputs):  # in the order of the table above
    with torch.inference_mode():
        return program(*map(torch.from_numpy, inputs.values())).numpy()"""


def _load_program(path: Path) -> Callable[..., Tensor]:
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
        lambda path: OnnxModel(path).predict,
        LOAD_ONNX,
        "It was checked with ONNX Runtime {onnxruntime}",
    ),
    "torch.export": Format(
        "model.pt2",
        lambda student, path: to_program(student.model, student.inputs, path, student.axes),
        _load_program,
        LOAD_PROGRAM,
        "torch {torch} wrote it, and other versions may not read it",
    ),
}


# ---------------------------------------------------------------- exporting


def export_student(name: str, student: Exportable, format: str, folder: Path) -> None:
    """Writes `student`, called `name`, into a folder, and prints the comparison with it.

    Raises UserError where it cannot be exported, or its export computes something else.
    """
    kind = FORMATS[format]
    with writing_folder(folder) as partial:
        try:
            kind.write(student, partial / kind.file)
        except Exception as error:  # whatever the exporters raise about a model that they cannot trace
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"{name} cannot be exported as {format} ({type(error).__name__}: {reason})") from error
        found = compare(name, student, kind.load(partial / kind.file))
        student.write_files(partial)
        record = {
            "student": name,
            "format": format,
            "tolerance": student.tolerance,
            "checks": [asdict(check) for check in found],
            "command": ["python", "-m", "kd.common.export", *command()[2:]],
            "environment": environment("fp32", "cpu") | {"onnxruntime": onnxruntime.__version__},
        }
        write_json(partial / RECORD, record)
        write_text(partial / "README.md", _readme(record, student, found, folder))
    print_rich(*_check_table(found, student.output), title=f"{name}, exported", below=f"export: {folder}")


def run_of(student: str) -> Path | None:
    """The folder of the run that a student, or a zip in its folder, belongs to."""
    path = Path(student).resolve()
    return next((folder for folder in (path, *path.parents[:2]) if (folder / RESULTS).is_file()), None)


def output_folder(student: str, output_dir: str | None, overwrite: bool) -> Path:
    """The folder of an export: `output_dir`, or `export` in that of the run or next to the student. Raises UserError
    where it would replace something else.
    """
    path = Path(student).resolve()
    if not output_dir and not path.exists():
        raise UserError(f"{student} is no folder or file: name a student's, or pass --output_dir for one of the Hub")
    folder = Path(output_dir or (run_of(student) or path.parent) / "export")
    if folder.exists() and not (folder / RECORD).exists():
        raise UserError(f"{folder} holds something else than an export: choose another --output_dir")
    if folder.exists() and not overwrite:
        raise UserError(f"{folder} holds an export: replace it with --overwrite_output_dir, or choose --output_dir")
    return folder


# ---------------------------------------------------------------- comparing


@dataclass(frozen=True)
class Check:
    """One of `test_inputs`: sizes of inputs and output, and the largest absolute difference of the export's output."""

    inputs: dict[str, list[int]]
    answer: list[int]
    difference: float


@torch.no_grad()
def compare(name: str, student: Exportable, exported: Callable[..., Tensor]) -> list[Check]:
    """Compares an export with its student. Raises UserError unless the outputs are equal within the tolerance."""
    found, differences = [], []
    for inputs in student.test_inputs:
        expected = student.predict(inputs)
        differences.append(max_abs_difference(expected.numpy(), exported(**inputs).numpy()))
        shapes = {key: list(value.shape) for key, value in inputs.items()}
        found.append(Check(shapes, list(expected.shape), float(differences[-1].max())))
    check_equal(name, np.concatenate(differences), "rows", student.tolerance, share_of_ties(student.model))
    return found


def share_of_ties(model: nn.Module) -> float:
    """Share of the rows, rounded up, that may differ by more than the tolerance: TIES with a bottleneck, else 0."""
    return TIES if any(isinstance(part, DiscreteKeyValueBottleneck) for part in model.modules()) else 0.0


def max_abs_difference(outputs: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The largest absolute difference in each row (rows,) of two outputs (rows, ...); infinite for unequal shapes."""
    if outputs.shape != others.shape:
        return np.full(len(outputs), np.inf)
    return np.abs(outputs.astype(np.float64) - others).reshape(len(outputs), -1).max(axis=1)


def check_equal(
    name: str, differences: np.ndarray, rows: str, tolerance: float = TOLERANCE, ties: float = 0.0
) -> None:
    """Raises UserError unless the `differences` (rows,) are within the tolerance, but for a share of `ties`."""
    wrong = ~(differences <= tolerance)  # NaN is wrong too
    if wrong.sum() > np.ceil(ties * len(wrong)):
        raise UserError(
            f"the export of {name} computes something else than the model: on {wrong.sum()} of {len(wrong)} {rows} it "
            f"differs by more than {tolerance:g}, at most by {differences.max():.3g}; nothing is written"
        )


def _check_table(found: list[Check], output: str) -> tuple[list[str], list[list[str]]]:
    rows = []
    for check in found:
        cells = [_sizes(size) for size in (*check.inputs.values(), check.answer)]
        rows.append([*cells, f"{check.difference:.1e}"])
    return [*found[0].inputs, output, "largest difference"], rows


def _sizes(axes: list[Any]) -> str:
    """(2, 7) as `2 x 7`; an axis may have a name instead."""
    return " x ".join(map(str, axes))


def _readme(record: dict[str, Any], student: Exportable, found: list[Check], folder: Path) -> str:
    kind, axes = FORMATS[record["format"]], axes_by_input(student.inputs, student.axes)
    inputs = [
        [
            name,
            str(value.dtype).removeprefix("torch."),
            _sizes([axes[name].get(i, n) for i, n in enumerate(value.shape)]),
        ]
        for name, value in student.inputs.items()
    ]
    share = share_of_ties(student.model)
    ties = f", but for {share:.1%} of the rows, where two keys are equally near" if share else ""
    sections = [
        f"# {record['student']}, exported",
        f"`{kind.file}` takes, in this order,",
        markdown(["input", "type", "size"], inputs),
        f"and returns `{student.output}`. It was loaded and compared with the student on inputs of these sizes; "
        f"the tolerance is {student.tolerance:g}{ties}.",
        markdown(*_check_table(found, student.output)),
        "## Load it",
        f"```python\n{kind.code.format(folder=folder, file=kind.file)}\n```",
        f"This needs no code of the project that made it. {kind.note.format(**record['environment'])}.",
        "## Use it",
        f"```python\n{student.usage.strip()}\n```",
        "## How it was made",
        f"```\n{shlex.join(record['command'])}\n```",
    ]
    return "\n\n".join(sections) + "\n"
