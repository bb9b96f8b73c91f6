"""The labels of a teacher, in the order of those of the data."""

import torch
from torch import nn

from kd.common.data.label_names import match_names, shorten_list
from kd.common.utils.errors import UserError
from kd.image_classification.data.image_data import ImageData
from kd.image_classification.teacher_model.classifier import ImageClassifier

FLAGS = "--label_names with its labels by id, or --trust_label_order if they are in the order of the data"


def label_order(
    name: str, labels: list[str] | None, data: ImageData, assume: bool = False
) -> tuple[list[int], list[str]]:
    """The ids of the data's classes in the teacher NAME, and notes.

    Args:
        labels: the labels of the teacher by id; None, or LABEL_0 and so on, if it does not name them.
        assume: whether labels without names may be assumed to have the data's order.

    Raises UserError for other labels than those of the data, and for an order that is not known.
    """
    if labels == data.label_names and data.model_labels is None:
        return list(range(len(data.label_names))), []
    names = None if labels is None or _are_placeholders(labels) else labels
    if labels is not None and len(labels) != len(data.label_names):
        raise _other_labels(name, labels, data)
    if names is None and data.model_labels is None:
        if not assume:
            raise UserError(f"{name} does not name its labels ({shorten_list(labels or [])}): pass {FLAGS}")
        note = f"the labels of {name} are assumed to have the order of those of {data.name}"
        return list(range(len(data.label_names))), [f"{note}: pass --label_names if they have another"]
    order = match_names(data.label_names, names or data.model_labels or [])
    if names is not None and data.model_labels is not None:
        raise UserError(
            f"--label_names and --trust_label_order have no effect, because {name} names its labels "
            f"({shorten_list(names)}): leave them out"
        )
    if sorted(order) != list(range(len(data.label_names))):
        if names is not None:
            raise _other_labels(name, names, data)
        raise UserError(
            f"--label_names are not the {len(data.label_names)} classes of {data.name}, "
            f"{shorten_list(data.label_names)}: correct them"
        )
    how = "matched by name" if names is not None or data.model_labels != data.label_names else "in the data's order"
    return order, [] if names == data.label_names else [f"the labels of {name} were {how}"]


def _are_placeholders(labels: list[str]) -> bool:
    return all(label == f"LABEL_{i}" for i, label in enumerate(labels))


def _other_labels(name: str, labels: list[str], data: ImageData) -> UserError:
    return UserError(
        f"{name} has {len(labels)} labels ({shorten_list(labels)}), {data.name} has {len(data.label_names)} "
        f"({shorten_list(data.label_names)}): pass a --teacher with the same labels"
    )


@torch.no_grad()
def reorder(name: str, model: ImageClassifier, order: list[int], data: ImageData) -> None:
    """Puts the rows of the classifier of NAME in the data's order. Raises UserError unless it is linear."""
    if order != list(range(len(order))):
        if not isinstance(model.head, nn.Linear):
            raise UserError(
                f"the label order of {name} differs from that of {data.name}, and its classifier is not linear, so "
                "that it cannot be changed: pass another --teacher"
            )
        for parameter in model.head.parameters():
            parameter.copy_(parameter[order])
    model.config.id2label = dict(enumerate(data.label_names))
    model.config.label2id = {label: i for i, label in enumerate(data.label_names)}
