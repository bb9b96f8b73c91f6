"""Datasets and models of any kind in the form that KDTrainer takes: rows are dictionaries, and outputs have names."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset
from transformers import PreTrainedModel

from kd.common.data.sources import holdout, labelled
from kd.common.distillation.row_labels import label_array
from kd.common.outputs import Outputs
from kd.common.reporting.model_card import Card
from kd.common.training.inference import NOT_INPUTS, column_array
from kd.common.utils.errors import UserError

TEACHER = "teacher_"  # prefix of the columns that are inputs of the teacher alone
INPUT = "input"  # the column of rows that are no dictionaries
LABELS = ("labels", "label")
WEIGHTS = "model.safetensors"
PIPELINE_TAGS = {  # of the Hub, by the end of the name of a transformers model
    "ForSequenceClassification": "text-classification",
    "ForImageClassification": "image-classification",
}
TRANSFORMERS_USAGE = """from {module} import {name}

folder = "student"  # the path of this model, or its name on the Hub
student = {name}.from_pretrained(folder).eval()"""
TORCH_USAGE = """from safetensors.torch import load_model

folder = "student"  # the path of this model
student = ...  # a {name}, as it was passed to distill()
load_model(student, f"{{folder}}/{weights}")
student.eval()"""


class Rows(Dataset[dict[str, Any]]):
    """The rows of a dataset as dictionaries of model inputs, `labels` if there are any, and `sample_id`.

    Args:
        rows: Anything with a length and rows: dictionaries, (input, label) tuples, or inputs alone.
        labels: (rows,), if they are known already; see `label_array`.

    Raises UserError for other data.
    """

    def __init__(self, rows: Any, labels: np.ndarray | None = None) -> None:
        check_dataset(rows)
        self.rows = rows
        self.labels = self._read_labels() if labels is None else labels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        columns = self._columns(index)
        columns.pop(LABELS[0], None)
        if self.labels is not None:
            columns[LABELS[0]] = self.labels[index]
        return columns | {"sample_id": index}

    def _columns(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        if isinstance(row, Mapping):
            return {LABELS[0] if name in LABELS else name: value for name, value in row.items()}
        if not isinstance(row, tuple):
            return {INPUT: row}
        if len(row) <= 2:
            return dict(zip((INPUT, LABELS[0]), row, strict=False))
        raise UserError(f"a row is a tuple of {len(row)}: make it a dictionary, or (input, label)")

    @property
    def inputs(self) -> list[str]:
        """The names of the columns that a model may take."""
        return [name for name in self[0] if name not in NOT_INPUTS]

    @property
    def is_labelled(self) -> np.ndarray:
        """Mask (rows,) of the rows with a label."""
        return np.zeros(len(self), dtype=bool) if self.labels is None else labelled(self.labels)

    def _read_labels(self) -> np.ndarray | None:
        """Class ids (int64) or scores (float) (rows,), or 0 and 1 (rows, labels); see `label_array`."""
        if LABELS[0] not in self._columns(0):
            return None
        stored = stored_labels(self.rows)
        return label_array([self._columns(i).get(LABELS[0]) for i in range(len(self))] if stored is None else stored)

    def split(self, share: float) -> tuple["Rows", "Rows"]:
        """Two parts, the second with a `share` of the rows with a label, of each class: the same in every run."""
        assert self.labels is not None
        known, chosen = self.is_labelled, np.zeros(len(self), dtype=bool)
        chosen[known] = holdout(self.labels[known], share)
        if not chosen.any():
            raise UserError(f"{known.sum()} training rows are too few to set some aside: pass `validation`")
        first, second = (np.flatnonzero(mask).tolist() for mask in (~chosen, chosen))
        return self._part(first), self._part(second)

    def labelled_part(self) -> "Rows":
        """The rows with a label."""
        return self if self.is_labelled.all() else self._part(np.flatnonzero(self.is_labelled).tolist())

    def _part(self, indices: list[int]) -> "Rows":
        assert self.labels is not None
        return Rows(Subset(self.rows, indices), self.labels[indices])


def check_dataset(rows: Any) -> None:
    """Raises UserError unless `rows` has a length above zero and rows."""
    if isinstance(rows, tuple | Mapping):
        kind = type(rows).__name__
        raise UserError(f"a dataset must be a sequence of rows, got a {kind}: pass one split, or TensorDataset(x, y)")
    if isinstance(rows, IterableDataset) or not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
        raise UserError(
            f"a dataset needs a length and rows, which {type(rows).__name__} lacks: pass a list of its rows"
        )
    if not len(rows):
        raise UserError("a dataset is empty: pass one with rows")


def stored_labels(rows: Any) -> Any:
    """The labels of a dataset that stores them as one column; None if all rows must be read."""
    if isinstance(rows, Subset):
        stored = stored_labels(rows.dataset)
        return None if stored is None else np.asarray(stored)[list(rows.indices)]
    if isinstance(rows, TensorDataset):
        return rows.tensors[1]
    for name in LABELS:
        if name in (getattr(rows, "column_names", None) or ()):  # of datasets.Dataset
            return column_array(rows, name)
    return None if getattr(rows, "target_transform", None) else getattr(rows, "targets", None)  # of torchvision


class Collator:
    """Batches of some columns: tensors of one shape are stacked, sequences of several lengths padded.

    Args:
        padding: Token ids for the padding of columns of tokens. Other columns are padded with 0.
    """

    def __init__(self, columns: Iterable[str], padding: Mapping[str, int]) -> None:
        self.columns, self.padding = tuple(columns), padding

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {name: self._column(name, [row[name] for row in rows]) for name in self.columns}

    def _column(self, name: str, values: list[Any]) -> Tensor:
        try:
            tensors = [torch.as_tensor(value) for value in values]
        except (TypeError, ValueError, RuntimeError):
            kind = type(values[0]).__name__
            raise UserError(f"column {name!r} holds {kind}, not tensors: convert it in the dataset") from None
        if name == "labels" and not tensors[0].is_floating_point():
            return torch.stack(tensors).long()
        tensors = [
            tensor.to(torch.get_default_dtype()) if tensor.is_floating_point() else tensor for tensor in tensors
        ]
        shapes = list(dict.fromkeys(tuple(tensor.shape) for tensor in tensors))
        if len(shapes) == 1:
            return torch.stack(tensors)
        if any(not shape or shape[1:] != shapes[0][1:] for shape in shapes):
            raise UserError(f"rows of column {name!r} have shapes {shapes[0]} and {shapes[1]}: make them equal")
        mask = name.replace("input_ids", "attention_mask")
        if name in self.padding and mask not in self.columns:
            raise UserError(f"{name} of several lengths need an {mask}: add it to the rows")
        return pad_sequence(tensors, batch_first=True, padding_value=self.padding.get(name, 0))


class NamedOutputs(nn.Module):
    """A model that takes a batch by name and returns `Outputs`. The module may return logits, or `logits` by name.

    Args:
        columns: The columns of the data that are no labels. The module gets those that are parameters of its forward,
            or the only one as its first argument. Columns with the prefix TEACHER are not for the student.
        is_teacher: Whether the module gets the column TEACHER + name in place of the column `name`, if there is one.

    Raises UserError if the module takes none of several columns.
    """

    def __init__(self, module: nn.Module, columns: list[str], is_teacher: bool = False) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise UserError(f"a model must be a torch.nn.Module, got {type(module).__name__}")
        self.module = module
        sources = {name: name for name in columns if not name.startswith(TEACHER)}
        if is_teacher:
            sources |= {name.removeprefix(TEACHER): name for name in columns if name.startswith(TEACHER)}
        parameters = inspect.signature(module.forward).parameters
        found = [name for name in sources if name in parameters]
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self.by_name = bool(found) or len(sources) > 1
        self.sources = {name: sources[name] for name in found or sources}
        if self.by_name and not found and not takes_any:
            raise UserError(
                f"{type(module).__name__} takes {', '.join(parameters)}, and the rows have {', '.join(columns)}: "
                "rename the columns"
            )

    @property
    def columns(self) -> list[str]:
        """The columns of the data that the module gets."""
        return list(self.sources.values())

    def forward(self, **batch: Tensor) -> Outputs:
        inputs = {name: batch[column] for name, column in self.sources.items()}
        output = self.module(**inputs) if self.by_name else self.module(*inputs.values())
        if isinstance(output, Tensor):
            output = Outputs(logits=output)
        logits = getattr(output, "logits", None) if not isinstance(output, Mapping) else output.get("logits")
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
            raise UserError(f"{type(self.module).__name__} must return logits (batch, classes), got {found}")
        return Outputs(logits=logits, features=output.get("features") if isinstance(output, Mapping) else None)

    def save_pretrained(self, folder: str | Path) -> None:
        if isinstance(self.module, PreTrainedModel):
            self.module.save_pretrained(folder)
        else:
            save_model(self.module, str(Path(folder, WEIGHTS)))

    def load(self, folder: str | Path) -> Self:
        """Loads the weights that `save_pretrained` wrote."""
        if isinstance(self.module, PreTrainedModel):
            self.module = type(self.module).from_pretrained(folder)
        else:
            load_model(self.module, str(Path(folder, WEIGHTS)))
        return self

    @property
    def card(self) -> Card:
        """The code that loads a saved model, and its library."""
        name = type(self.module).__name__
        if not isinstance(self.module, PreTrainedModel):
            return Card(TORCH_USAGE.format(name=name, weights=WEIGHTS))
        if not type(self.module).__module__.startswith("transformers."):
            return Card(TRANSFORMERS_USAGE.format(module=type(self.module).__module__, name=name))
        tag = next((tag for head, tag in PIPELINE_TAGS.items() if name.endswith(head)), None)
        return Card(TRANSFORMERS_USAGE.format(module="transformers", name=name), "transformers", tag)


@contextmanager
def restored(module: nn.Module) -> Iterator[None]:
    """Restores mode, requires_grad and device of a module afterwards."""
    training = {child: child.training for child in module.modules()}
    gradients = {parameter: parameter.requires_grad for parameter in module.parameters()}
    device = next((parameter.device for parameter in gradients), None)
    try:
        yield
    finally:
        for child, mode in training.items():
            child.training = mode
        for parameter, required in gradients.items():
            parameter.requires_grad_(required)
        if device is not None:
            module.to(device)
