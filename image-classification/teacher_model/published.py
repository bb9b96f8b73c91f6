"""Teachers with the weights of other projects: a file for an architecture, timm's, and models of transformers."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification

from kd.common.pretrained import load_model, reading
from kd.common.utils.errors import UserError, reason_of
from kd.image_classification.data.image_data import ImageData
from kd.image_classification.teacher_model.backbones.factories import call_factory, import_factory
from kd.image_classification.teacher_model.backbones.names import TIMM, TRANSFORMERS, is_factory
from kd.image_classification.teacher_model.classifier import ImageClassifier, new_classifier
from kd.image_classification.teacher_model.conversion import from_network
from kd.image_classification.teacher_model.labels import label_order, reorder
from kd.image_classification.teacher_model.state_dicts import State, read_state_dict, rename
from kd.image_classification.teacher_model.timm_weights import load_timm_weights, timm_classifier


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation of the pixels (0 to 1) in the training of a teacher; None if unknown."""

    mean: list[float] | None = None
    std: list[float] | None = None

    def apply(self, data: ImageData, mean: Any = None, std: Any = None) -> ImageData:
        """The data in this normalization, or in `mean` and `std`, those of the model's files, or unchanged."""
        found = [list(value) if value is not None else None for value in (self.mean or mean, self.std or std)]
        for name, values in zip(("mean", "std"), found, strict=True):
            if values is not None and len(values) not in (1, 3):
                raise UserError(f"--teacher_{name} needs one value per channel, 1 or 3, got {len(values)}")
        return replace(data, mean=found[0] or data.mean, std=found[1] or data.std)


def load_weights(
    architecture: str, path: str, data: ImageData, normalization: Normalization
) -> tuple[ImageClassifier, ImageData]:
    """The classifier of an architecture with the weights in a file, and the data in its normalization.

    Raises UserError if the weights do not fit. Adds notes to the data on what was assumed.
    """
    if not Path(path).is_file():
        raise UserError(f"there is no file {path}: pass --teacher_weights FILE with the weights of {architecture}")
    notes = list(data.notes)
    normalized = normalization.apply(data)
    if normalization.mean is None or normalization.std is None:
        notes.append(
            f"the images are normalized with the mean {normalized.mean} and std {normalized.std} of the data: pass "
            "--teacher_mean and --teacher_std if the teacher was trained with others"
        )
    order, order_notes = label_order(path, None, data, assume=True)
    notes += order_notes
    if architecture.startswith(TIMM):
        network = load_timm_weights(architecture, path, len(data.label_names), data.size)
        model = timm_classifier(architecture, network, normalized.config)
    elif is_factory(architecture):
        import_factory(architecture)
        network = call_factory(architecture, len(data.label_names), data.size)
        _load_strictly(network, read_state_dict(path), path, architecture)
        model = from_network(network, architecture, normalized.config)
    else:
        model = new_classifier(architecture, normalized.config).eval()
        renamed, how = rename(read_state_dict(path), model.state_dict(), architecture)
        model.load_state_dict(renamed)
        notes.append(f"the weights of {path} were matched with {architecture} by {how}")
    reorder(path, model, order, data)
    return model, replace(normalized, notes=notes)


def _load_strictly(network: nn.Module, state: State, path: str, architecture: str) -> None:
    try:
        network.load_state_dict(state)
    except Exception as error:  # a hook of the user's code may raise any
        raise UserError(
            f"the weights of {path} do not fit {architecture} ({reason_of(error)}): pass the network of these weights"
        ) from error


# ---- transformers ----


def load_transformers(name: str, data: ImageData, normalization: Normalization) -> tuple[ImageClassifier, ImageData]:
    """The image classifier of transformers in a folder or on the Hub, and the data in its normalization.

    Its classes are those of the data in any order. Raises UserError for other classes, and for names that only count
    (LABEL_0) unless flags name their order.
    """
    with reading(name, "an image classifier of transformers"):
        network = load_model(AutoModelForImageClassification, name)
    order, notes = label_order(name, [network.config.id2label[i] for i in sorted(network.config.id2label)], data)
    mean, std = _processor_statistics(name)
    if mean is None and normalization.mean is None:
        notes.append(
            f"{name} has no preprocessor_config.json: pass --teacher_mean and --teacher_std if it was trained with "
            "another normalization than that of the data"
        )
    normalized = normalization.apply(data, mean, std)
    model = _sized(name, network, normalized)
    reorder(name, model, order, data)
    return model, replace(normalized, notes=[*data.notes, *notes])


def _sized(name: str, network: Any, data: ImageData) -> ImageClassifier:
    """The classifier of a network of transformers for images of the data's size. Raises UserError if the network needs
    another size.
    """
    architecture, size = f"{TRANSFORMERS}{network.config.model_type}", getattr(network.config, "image_size", None)
    try:
        return from_network(network, architecture, data.config, network.config.to_dict())
    except UserError as error:
        if size in (None, data.size):
            raise
        raise UserError(
            f"{name} was trained on images of {size} pixels, {data.name} has {data.size}: pass --image_size {size}"
        ) from error


def _processor_statistics(name: str) -> tuple[Any, Any]:
    try:
        processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, ImportError):
        return None, None
    return getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
