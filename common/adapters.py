"""Datasets and modules of any kind, in the form that KDTrainer takes: rows are dictionaries, outputs have names."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from kd.common.objective import IGNORED
from kd.common.outputs import Outputs
from kd.common.utils.errors import UserError

INPUT = "input"  # the column of rows that are no dictionaries
WEIGHTS = "model.safetensors"


class Rows(Dataset[dict[str, Any]]):
    """The rows of a dataset as dictionaries of model inputs, with `labels`, if there are any, and `sample_id`.

    Args:
        rows: anything with a length and rows: dictionaries, whose label is in the column `labels` or `label`,
            (input, label) tuples, or inputs alone.
        labels: (rows,), if they are known already.
    """

    def __init__(self, rows: Any, labels: np.ndarray | None = None) -> None:
        if not hasattr(rows, "__len__") or not len(rows):
            raise UserError("a dataset needs a length above zero and rows: pass a map-style dataset or a list")
        self.rows = rows
        self.labels = labels if labels is not None else self._read_labels()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        if isinstance(row, Mapping):
            columns = {"labels" if name == "label" else name: value for name, value in row.items()}
        elif isinstance(row, tuple | list) and len(row) == 2:
            columns = {INPUT: row[0], "labels": row[1]}
        else:
            columns = {INPUT: row}
        return columns | {"sample_id": index}

    def _read_labels(self) -> np.ndarray | None:
        """Labels (rows,): class ids (integers), or scores (floats); None without labels.

        torchvision's `targets`, if there are any, spare reading all rows.
        """
        if "labels" not in self[0]:
            return None
        targets = getattr(self.rows, "targets", None)
        labels = np.asarray([self[i]["labels"] for i in range(len(self))] if targets is None else targets)
        if labels.ndim != 1 or labels.dtype.kind not in "iuf":
            raise UserError(f"labels must be one number for each row, got an array {labels.shape} of {labels.dtype}")
        return labels


class Collator:
    """Batches of rows: tensors of one shape are stacked, sequences of several lengths padded.

    Columns that no model takes, such as the text of a tokenized row, are left out.
    """

    def __init__(self, columns: Iterable[str], padding: int = 0) -> None:
        self.columns, self.padding = tuple(columns), padding

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {name: self._column(name, [row[name] for row in rows]) for name in self.columns}

    def _column(self, name: str, values: list[Any]) -> Tensor:
        try:
            tensors = [torch.as_tensor(value) for value in values]
        except (TypeError, ValueError, RuntimeError):
            raise UserError(
                f"column {name!r} holds {type(values[0]).__name__}, not numbers: convert it to tensors in the dataset"
            ) from None
        if len({tensor.shape for tensor in tensors}) == 1:
            return torch.stack(tensors)
        value = IGNORED if name == "labels" else self.padding if name == "input_ids" else 0
        return pad_sequence(tensors, batch_first=True, padding_value=value)


class NamedOutputs(nn.Module):
    """Calls a module with those inputs of a batch that it takes, and returns `Outputs`.

    The module may return logits, a dictionary or ModelOutput with `logits`, or Outputs.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: Tensor) -> Outputs:
        if INPUT in inputs:
            output = self.module(inputs[INPUT])
        else:
            output = self.module(**{name: inputs[name] for name in accepted(self.module, inputs)})
        if isinstance(output, Outputs):
            return output
        if isinstance(output, Tensor):
            return Outputs(logits=output)
        if isinstance(output, Mapping) and "logits" in output:
            return Outputs(logits=output["logits"], features=output.get("features"))
        raise UserError(f"{type(self.module).__name__} must return logits, or `logits` by name, got {type(output)}")

    def save_pretrained(self, folder: str | Path) -> None:
        save_model(self.module, str(Path(folder, WEIGHTS)))

    def load(self, folder: str | Path) -> "NamedOutputs":
        load_model(self.module, str(Path(folder, WEIGHTS)))
        return self


def accepted(module: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of `names` that the forward of a module has as parameters; all if it has **kwargs and no others do."""
    parameters = inspect.signature(module.forward).parameters
    found = [name for name in names if name in parameters]
    any_name = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return list(names) if any_name and not found else found


@contextmanager
def restored(module: nn.Module) -> Iterator[None]:
    """Restores the training mode and requires_grad of a module afterwards."""
    training = {child: child.training for child in module.modules()}
    gradients = {parameter: parameter.requires_grad for parameter in module.parameters()}
    try:
        yield
    finally:
        for child, mode in training.items():
            child.training = mode
        for parameter, required in gradients.items():
            parameter.requires_grad_(required)
