"""Loading teachers: the folder of a trained classifier, a pretrained network of timm, or an untrained architecture."""

import os
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn
from transformers import AutoConfig, set_seed

from kd.common.data.sources import offline_if_unreachable, shorten
from kd.common.pretrained import load_model, reading
from kd.common.utils.errors import UserError
from kd.image_classification.data.loading import ImageData
from kd.image_classification.teacher_model.backbones import TIMM, known_weights
from kd.image_classification.teacher_model.classifier import ImageClassifier, ImageClassifierConfig, new_classifier

IMAGENET_CLASSES = 1000  # in the order of their WordNet ids
TOLERANCE = 1e-4  # of logits, relative to the largest


def load_teacher(name: str, data: ImageData, seed: int) -> tuple[ImageClassifier, ImageData, bool]:
    """Returns the teacher NAME, the data in its normalization, and whether the teacher is pretrained.

    The classifier of a folder is pretrained, and so is a network of timm if the data have ImageNet's classes. Any
    other NAME is an architecture, which is initialized with `seed`; the data are then unchanged.
    """
    folder = trained_folder(name)
    if folder:
        return *load_trained(folder, data), True
    if name.startswith(TIMM) and len(data.label_names) == IMAGENET_CLASSES:
        model = pretrained_classifier(name.removeprefix(TIMM), label_names=data.label_names, image_size=data.size)
        return model, replace(data, mean=model.config.mean, std=model.config.std), True
    set_seed(seed)
    return new_classifier(name, data.config), data, False


def load_ensemble_teachers(names: Sequence[str], data: ImageData) -> list[ImageClassifier]:
    """Loads the classifiers of these folders. `data` has the normalization of --teacher.

    Raises UserError for a classifier that was trained with another normalization or other labels.
    """
    teachers = []
    for name in names:
        folder = trained_folder(name)
        if folder is None:
            raise UserError(f"--ensemble_teachers {name} is not a trained classifier: pass the folder of one")
        teacher, normalized = load_trained(folder, data)
        if (normalized.mean, normalized.std) != (data.mean, data.std):
            raise UserError(
                f"--ensemble_teachers {name} was trained with another normalization of the images than --teacher: "
                "choose one that was trained on the same data"
            )
        teachers.append(teacher)
    return teachers


# ---- a classifier in a folder ----


def trained_folder(name: str) -> Path | None:
    """The folder of a trained classifier: NAME itself, or the teacher or student of the run NAME.

    None if NAME is not a path. Raises UserError for a path without a classifier.
    """
    try:
        for folder in (Path(name), Path(name, "stages", "teacher"), Path(name, "student")):
            if (folder / "config.json").exists():
                return folder
        is_folder, is_file = Path(name).is_dir(), Path(name).is_file()
    except OSError as error:
        raise UserError(f"cannot read folder {shorten(name)}: {error.strerror}") from error
    if is_folder:
        raise UserError(f"no classifier in folder {name}: it has no config.json; train_teacher.py creates one")
    if is_file:
        raise UserError(
            f"{name} is a file: pass the folder of a classifier that train_teacher.py created, the name of a network "
            f"to train, or {TIMM}NAME; pretrained_classifier(NAME, checkpoint=FILE).save_pretrained(FOLDER) converts "
            "weights of timm"
        )
    if "/" in name and not name.startswith(TIMM):
        raise UserError(f"there is no folder {shorten(name)}: train_teacher.py --output_dir FOLDER creates one")
    return None


def load_trained(folder: Path, data: ImageData, any_labels: bool = False) -> tuple[ImageClassifier, ImageData]:
    """Loads the classifier of a folder. Returns it with the data in its normalization.

    Raises UserError for another kind of model, another image size and, unless `any_labels`, other labels.
    """
    config = trained_config(folder)
    if not any_labels:
        _check_labels(folder, config.label_names, data)
    if config.image_size != data.size:
        raise UserError(
            f"{folder} was trained on images of {config.image_size} pixels, {data.name} has {data.size}: pass "
            f"--image_size {config.image_size}"
        )
    with reading(folder, "an image classifier of this project"):
        model = load_model(ImageClassifier, folder)
    return model, replace(data, mean=config.mean or data.mean, std=config.std or data.std)


def trained_config(folder: Path) -> ImageClassifierConfig:
    """The configuration of a classifier's folder. Raises UserError for another kind of model."""
    with reading(folder, "an image classifier of this project"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if not isinstance(config, ImageClassifierConfig):
        raise UserError(f"{folder} holds a {config.model_type}, not an image classifier of this project")
    return config


def _check_labels(folder: Path, labels: list[str], data: ImageData) -> None:
    if labels == data.label_names:
        return
    if sorted(labels) == sorted(data.label_names):
        first = next(i for i, (a, b) in enumerate(zip(labels, data.label_names, strict=True)) if a != b)
        raise UserError(
            f"the label order of {folder} differs from that of {data.name}: label {first} is {labels[first]!r} for "
            f"this model and {data.label_names[first]!r} in the data"
        )
    raise UserError(
        f"{folder} has {len(labels)} labels ({', '.join(labels[:3])}, ...), {data.name} has {len(data.label_names)} "
        f"({', '.join(data.label_names[:3])}, ...): pass a teacher with the same labels"
    )


# ---- timm's pretrained networks ----


def pretrained_classifier(
    name: str,
    checkpoint: str | None = None,
    label_names: list[str] | None = None,
    image_size: int | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
) -> ImageClassifier:
    """timm's NAME (`resnet18`, `resnet18.a1_in1k`) with pretrained weights, in evaluation mode.

    Raises UserError for weights that cannot be loaded, and for a network that does not end in a map, global average
    pooling and one linear layer, as an ImageClassifier does. The logits are compared with those of timm's network.

    Args:
        checkpoint: file with weights of timm's network (.safetensors or torch.save); default: the weights on the Hub.
        label_names: by class id; default: ImageNet's.
        image_size, mean, std: of the images that the weights were trained on; default: timm's.
    """
    weights = known_weights(name)
    labels = label_names or _imagenet_labels(name, weights.num_classes)
    if checkpoint is None and len(labels) != weights.num_classes:
        raise UserError(f"timm's {name} has {weights.num_classes} classes, not the {len(labels)} of label_names")
    size = image_size or weights.input_size[-1]
    data_config = {
        "image_size": size,
        "mean": mean or list(weights.mean),
        "std": std or list(weights.std),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
    }
    model = new_classifier(f"{TIMM}{name}", data_config).eval()
    original = _load(name, checkpoint, len(labels)).eval()
    images = torch.randn(2, 3, size, size, generator=torch.Generator())
    with torch.no_grad():
        expected = original(images)
        _copy_weights(model, name, original)
        difference = (model(images).logits - expected).abs().max() / expected.abs().max()
    if not difference <= TOLERANCE:
        raise UserError(_unsupported_head(name, f"the logits would differ by {difference:.2%}"))
    return model


def _copy_weights(model: ImageClassifier, name: str, original: Any) -> None:
    """Copies all weights of timm's network, and removes its classifier."""
    head = original.get_classifier()
    if not isinstance(head, nn.Linear):
        raise UserError(_unsupported_head(name, f"its classifier is {textwrap.shorten(str(head), 200)}"))
    try:
        model.head.load_state_dict(head.state_dict())
        original.reset_classifier(0, "")
        buffers = dict(original.named_buffers())  # also those that timm does not save
        model.backbone.get_submodule("model").load_state_dict({**original.state_dict(), **buffers})
    except (AssertionError, RuntimeError, TypeError) as error:
        raise UserError(_unsupported_head(name, textwrap.shorten(str(error), 200))) from error


def _load(name: str, checkpoint: str | None, classes: int) -> Any:
    """timm's network with its classifier, and with weights from the file or from the Hub."""
    if checkpoint is None:
        try:
            with offline_if_unreachable():
                return timm.create_model(name, pretrained=True)
        except (OSError, RuntimeError, ValueError) as error:
            reason = textwrap.shorten(str(error), 300).rstrip(".")
            raise UserError(
                f"cannot get timm's pretrained weights of {name} ({reason}): pass the local folder of a trained "
                "classifier instead, or the file of these weights as checkpoint"
            ) from error
    if not os.path.isfile(checkpoint):
        raise UserError(f"there is no file {checkpoint}: pass one with weights of timm's {name}")
    # With another number of classes timm would silently skip the weights of the classifier.
    overlay = {"file": checkpoint, "num_classes": classes, "custom_load": False}
    try:
        return timm.create_model(name, pretrained=True, num_classes=classes, pretrained_cfg_overlay=overlay)
    except Exception as error:  # each format has its own exceptions for damaged files and other networks
        reason = textwrap.shorten(str(error), 300)
        raise UserError(f"{checkpoint} holds no weights of timm's {name} with {classes} classes ({reason})") from error


def _imagenet_labels(name: str, classes: int) -> list[str]:
    """WordNet's description of each class, with the WordNet id if several classes have the same description."""
    subset = infer_imagenet_subset({"num_classes": classes})
    if subset is None:
        raise UserError(f"timm's {name} has {classes} classes, which are not ImageNet's: pass label_names")
    info = ImageNetInfo(subset)
    descriptions = info.label_descriptions()
    count = Counter(descriptions)
    return [
        text if count[text] == 1 else f"{text} ({wordnet_id})"
        for text, wordnet_id in zip(descriptions, info.label_names(), strict=True)
    ]


def _unsupported_head(name: str, reason: str) -> str:
    return (
        f"timm's {name} does not end in global average pooling and one linear layer ({reason}): choose a network that "
        "does, such as resnet18"
    )
