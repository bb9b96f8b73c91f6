"""Exports a student to one file, and compares it with the student.

Each domain has a function `load(name, task) -> Exportable` in its `student_model/exportable.py`.
"""

import math
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from kd.common.bottleneck.module import DiscreteKeyValueBottleneck
from kd.common.bottleneck.sizes import Table, byte_table, sizes
from kd.common.export.int8 import load_int8, quantize_dynamic, rounding_bound
from kd.common.export.onnx import Axes, OnnxModel, axes_by_input, get_logits, load_program, to_onnx, to_program
from kd.common.reporting.results import RESULTS
from kd.common.reporting.tables import markdown, print_rich
from kd.common.utils.devices import command, environment
from kd.common.utils.errors import UserError
from kd.common.utils.files import write_json, write_text, writing_folder

RECORD = "export.json"  # marks a folder as an export
TOLERANCE = 1e-3  # for a logit: a prediction changes only if the two largest logits differ by less than twice that
TIES = 1e-3  # share of rows that may differ with a bottleneck: for equally near keys, the code depends on rounding


@dataclass
class Exportable:
    """A student, example inputs, and code that uses it.

    model: in eval mode on the CPU; `model(**inputs)` returns a tensor (batch, ...) or an output with logits.
    inputs: the traced example, {name: (batch, ...)}, of size 2 or more along `axes`.
    test_inputs: inputs for the comparison, with other sizes than the example along all `axes`.
    axes: the axes of variable size, as in `kd.common.export.onnx.to_onnx`.
    usage: Python code that uses `folder` and `model(inputs)`, a function from {name: array} to an array. It must not
        need this project.
    output: name of the output.
    write_files: writes the files that `usage` reads into a folder.
    reference: computes the expected outputs. Default: the model. Differs for students of another library.
    tolerance: largest absolute difference of an output.
    untrained: Python code that makes `network`, an untrained model like the student, from `folder`. It may need this
        project. Without it there is no int8.

    Raises ValueError if all `test_inputs` have the example's size along an axis.
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
    untrained: str | None = None

    def __post_init__(self) -> None:
        for name, axes in axes_by_input(self.inputs, self.axes).items():
            for axis, meaning in axes.items():
                if {other[name].shape[axis] for other in self.test_inputs} <= {self.inputs[name].shape[axis]}:
                    raise ValueError(f"no test input has another size of {name}'s {meaning}")

    @torch.no_grad()
    def predict(self, inputs: dict[str, Tensor]) -> Tensor:
        """The output of the student."""
        return get_logits((self.reference or self.model)(**inputs))


# ---------------------------------------------------------------- formats

ALONE = "This does not need the project that exported it."
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


LOAD_INT8 = """import torch
from kd.common.export.int8 import load_int8

folder = "{folder}"  # this folder
{untrained}
network = load_int8(network, f"{{folder}}/{file}")


def model(inputs):
    with torch.inference_mode():
        return network(**{{name: torch.from_numpy(array) for name, array in inputs.items()}}).logits.numpy()"""


def _load_program(path: Path) -> Callable[..., Tensor]:
    program = load_program(path)
    return lambda **inputs: program(*inputs.values())


def _load_int8(student: Exportable, path: Path) -> Callable[..., Tensor]:
    network = load_int8(student.model, path)
    return lambda **inputs: get_logits(network(**inputs))


class Format(NamedTuple):
    """A file format: functions that write and load a student, and the code in README.md that loads it.

    rounded: whether outputs may differ by more than the tolerance, because weights are rounded.
    """

    file: str
    write: Callable[[Exportable, Path], None]
    load: Callable[[Exportable, Path], Callable[..., Tensor]]
    code: str
    note: str
    rounded: bool = False


FORMATS = {
    "onnx": Format(
        "model.onnx",
        lambda student, path: to_onnx(student.model, student.inputs, path, student.axes, student.output),
        lambda student, path: OnnxModel(path).predict,
        LOAD_ONNX,
        f"{ALONE} It was checked with ONNX Runtime {{onnxruntime}}",
    ),
    "torch.export": Format(
        "model.pt2",
        lambda student, path: to_program(student.model, student.inputs, path, student.axes),
        lambda student, path: _load_program(path),
        LOAD_PROGRAM,
        f"{ALONE} It was written by torch {{torch}}; other versions may not read it",
    ),
    "torch-int8": Format(
        "model_int8.safetensors",
        lambda student, path: save_model(quantize_dynamic(student.model), str(path)),
        _load_int8,
        LOAD_INT8,
        "This needs the project that exported it. The file has only the weights",
        rounded=True,
    ),
}


# ---------------------------------------------------------------- exporting


def export_student(name: str, student: Exportable, format: str, folder: Path) -> None:
    """Exports `student` into a folder and prints the comparison. `name` is used in messages and README.md.

    Raises UserError if it cannot be exported, or if the outputs of the export differ.
    """
    kind = FORMATS[format]
    if kind.rounded and student.untrained is None:
        raise UserError(f"{format} is for image classifiers: pass another --format; texts have NLP/scripts/export.py")
    with writing_folder(folder) as partial:
        try:
            kind.write(student, partial / kind.file)
        except Exception as error:  # the exporters raise many types for a model that they cannot trace
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"{name} cannot be exported as {format} ({type(error).__name__}: {reason})") from error
        tolerance = student.tolerance + (rounding_bound(student.model) if kind.rounded else 0)
        found = compare(name, student, kind.load(student, partial / kind.file), tolerance)
        student.write_files(partial)
        record = {
            "student": name,
            "format": format,
            "tolerance": tolerance if math.isfinite(tolerance) else None,
            "checks": [asdict(check) for check in found],
            "command": ["python", "-m", "kd.common.export", *command()[2:]],
            "environment": environment("fp32", "cpu") | {"onnxruntime": onnxruntime.__version__},
        }
        write_json(partial / RECORD, record)
        byte_counts = _bytes(student, kind)
        write_text(partial / "README.md", _readme(record, student, found, byte_counts, folder))
    if byte_counts:
        print_rich(*byte_counts, title="bytes of the parts")
    print_rich(*_check_table(found, student.output), title=f"{name}, exported", below=f"export: {folder}")


def run_of(student: str) -> Path | None:
    """The folder of the run that a student, or a zip file in its folder, belongs to."""
    path = Path(student).resolve()
    return next((folder for folder in (path, *path.parents[:2]) if (folder / RESULTS).is_file()), None)


def output_folder(student: str, output_dir: str | None, overwrite: bool) -> Path:
    """Returns the folder of an export: `output_dir`, or `export` in the run folder or next to the student. Raises
    UserError if it exists, unless it is an export and `overwrite`.
    """
    path = Path(student).resolve()
    if not output_dir and not path.exists():
        raise UserError(
            f"{student} is no folder or file: pass that of a student, or --output_dir for a student on the Hub"
        )
    folder = Path(output_dir or (run_of(student) or path.parent) / "export")
    if folder.exists() and not (folder / RECORD).exists():
        raise UserError(f"{folder} is not an export: choose another --output_dir")
    if folder.exists() and not overwrite:
        raise UserError(
            f"{folder} is an earlier export: pass --overwrite_output_dir to replace it, or another --output_dir"
        )
    return folder


# ---------------------------------------------------------------- comparing


@dataclass(frozen=True)
class Check:
    """A comparison on one of `test_inputs`: shapes, and the largest absolute difference of the outputs."""

    inputs: dict[str, list[int]]
    output: list[int]
    difference: float


@torch.no_grad()
def compare(name: str, student: Exportable, exported: Callable[..., Tensor], tolerance: float) -> list[Check]:
    """Compares an export with its student. Raises UserError if outputs differ by more than the tolerance."""
    found, differences = [], []
    for inputs in student.test_inputs:
        expected = student.predict(inputs)
        differences.append(max_abs_difference(expected.numpy(), exported(**inputs).numpy()))
        shapes = {key: list(value.shape) for key, value in inputs.items()}
        found.append(Check(shapes, list(expected.shape), float(differences[-1].max())))
    check_equal(name, np.concatenate(differences), "rows", tolerance, share_of_ties(student.model))
    return found


def share_of_ties(model: nn.Module) -> float:
    """The share of rows (rounded up) that may differ by more than the tolerance: TIES with a bottleneck, else 0."""
    return TIES if any(isinstance(part, DiscreteKeyValueBottleneck) for part in model.modules()) else 0.0


def max_abs_difference(outputs: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Returns the largest absolute difference (rows,) in each row of two outputs (rows, ...); inf if shapes differ."""
    if outputs.shape != others.shape:
        return np.full(len(outputs), np.inf)
    return np.abs(outputs.astype(np.float64) - others).reshape(len(outputs), -1).max(axis=1)


def check_equal(
    name: str, differences: np.ndarray, rows: str, tolerance: float = TOLERANCE, ties: float = 0.0
) -> None:
    """Raises UserError if more than a share `ties` of the `differences` (rows,) exceeds the tolerance."""
    wrong = ~(differences <= tolerance)  # also NaN
    if wrong.sum() > np.ceil(ties * len(wrong)):
        raise UserError(
            f"the export of {name} does not reproduce the model: on {wrong.sum()} of {len(wrong)} {rows} the outputs "
            f"differ by more than {tolerance:g}, at most by {differences.max():.3g}; nothing was written"
        )


def _bytes(student: Exportable, kind: Format) -> Table | None:
    """The bytes of the parts of a student with a bottleneck, before and after its weights are rounded."""
    if not kind.rounded:
        return None
    return byte_table({"student": sizes(student.model), kind.file: sizes(quantize_dynamic(student.model))})


def _check_table(found: list[Check], output: str) -> Table:
    rows = []
    for check in found:
        cells = [_sizes(size) for size in (*check.inputs.values(), check.output)]
        rows.append([*cells, f"{check.difference:.1e}"])
    return [*found[0].inputs, output, "largest difference"], rows


def _sizes(axes: list[Any]) -> str:
    """(2, 7) as `2 x 7`; an axis of variable size is shown by its name."""
    return " x ".join(map(str, axes))


def _readme(
    record: dict[str, Any], student: Exportable, found: list[Check], byte_counts: Table | None, folder: Path
) -> str:
    kind, axes = FORMATS[record["format"]], axes_by_input(student.inputs, student.axes)
    inputs = [
        [
            name,
            str(value.dtype).removeprefix("torch."),
            _sizes([axes[name].get(i, n) for i, n in enumerate(value.shape)]),
        ]
        for name, value in student.inputs.items()
    ]
    share, tolerance = share_of_ties(student.model), record["tolerance"]
    ties = f", except for up to {share:.1%} of the rows, where two keys are equally near" if share else ""
    allowed = f"the tolerance is {tolerance:.3g}{ties}" if tolerance else "int8 layers have no tolerance"
    sections = [
        f"# {record['student']}, exported",
        f"Inputs of `{kind.file}`, in this order:",
        markdown(["input", "type", "size"], inputs),
        f"It returns `{student.output}`. It was loaded and compared with the student on inputs of these shapes; "
        f"{allowed}.",
        markdown(*_check_table(found, student.output)),
        *([markdown(*byte_counts)] if byte_counts else []),
        "## Load it",
        f"```python\n{kind.code.format(folder=folder, file=kind.file, untrained=student.untrained)}\n```",
        f"{kind.note.format(**record['environment'])}.",
        "## Use it",
        f"```python\n{student.usage.strip()}\n```",
        "## How it was exported",
        f"```\n{shlex.join(record['command'])}\n```",
    ]
    return "\n\n".join(sections) + "\n"
