"""Loading teachers: trained classifiers, pretrained networks of timm, and untrained architectures."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, set_seed

from kd.common.data.sources import print_notes, shorten
from kd.common.pretrained import load_model, reading
from kd.common.utils.errors import UserError
from kd.image_classification.data.image_data import ImageData
from kd.image_classification.teacher_model.backbones.names import PRETRAINED, TIMM, TRANSFORMERS
from kd.image_classification.teacher_model.classifier import ImageClassifier, ImageClassifierConfig, new_classifier
from kd.image_classification.teacher_model.labels import label_order, reorder
from kd.image_classification.teacher_model.pretrained import pretrained_folder
from kd.image_classification.teacher_model.published import Normalization, load_transformers, load_weights
from kd.image_classification.teacher_model.timm_weights import pretrained_classifier

IMAGENET_CLASSES = 1000  # in the order of their WordNet ids
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
ANY = Normalization()
Kinds = tuple[type[PreTrainedConfig], ...]  # configurations of classifiers
FILE_ADVICE = (
    "pass --teacher FILE --teacher_architecture NAME with the network of these weights (resnet32x4, wrn_40_2, "
    "timm:NAME, package.module:factory) and, if they are known, --teacher_mean and --teacher_std of its training and "
    "--teacher_accuracy of its publication; the accuracy is measured before anything is trained"
)


def load_teacher(
    name: str, data: ImageData, seed: int, weights: str | None = None, normalization: Normalization = ANY
) -> tuple[ImageClassifier, ImageData, bool]:
    """Returns the teacher NAME, the data in its normalization, and whether the teacher is pretrained.

    The classifier of a folder is pretrained, and so are `pretrained:NAME`, an architecture with `weights`, a file, an
    image classifier of transformers, and a network of timm if the data have ImageNet's classes. Any other NAME is an
    architecture, which is initialized with `seed`; the data are then unchanged. Raises UserError for a `normalization`
    without effect.
    """
    if weights is not None:
        return *load_weights(name, weights, data, normalization), True
    folder = trained_folder(name)
    if is_transformers(name, folder):
        return *load_transformers(str(folder or name), data, normalization), True
    if normalization != ANY:
        raise UserError(
            f"--teacher_mean and --teacher_std have no effect, because teacher {name} has a normalization: leave them "
            "out"
        )
    if folder:
        return *load_trained(folder, data), True
    if name.startswith(TIMM) and len(data.label_names) == IMAGENET_CLASSES:
        model = pretrained_classifier(name.removeprefix(TIMM), label_names=data.label_names, image_size=data.size)
        return model, replace(data, mean=model.config.mean, std=model.config.std), True
    set_seed(seed)
    return new_classifier(name, data.config), data, False


def is_project_classifier(name: str) -> bool:
    """Whether NAME is a folder of a classifier that this project trained."""
    folder = trained_folder(name)
    return folder is not None and not is_transformers(name, folder)


def is_transformers(name: str, folder: Path | None) -> bool:
    """Whether a folder with a configuration is of another model than an ImageClassifier, or NAME is a Hub name."""
    if folder is None:
        return HUB_NAME.fullmatch(name) is not None
    with reading(folder, "an image classifier"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return type(config) in AutoModelForImageClassification._model_mapping and not isinstance(
        config, ImageClassifierConfig
    )


def load_ensemble_teachers(names: Sequence[str], data: ImageData) -> list[ImageClassifier]:
    """Loads the classifiers of these folders. `data` has the normalization of --teacher.

    Adds notes to the data. Raises UserError for a classifier with another normalization or other labels.
    """
    teachers = []
    for name in names:
        folder = trained_folder(name)
        if folder is None:
            raise UserError(f"--ensemble_teachers {name} is not a trained classifier: pass the folder of one")
        teacher, normalized = load_trained(folder, replace(data, model_labels=None))
        if (normalized.mean, normalized.std) != (data.mean, data.std):
            raise UserError(
                f"--ensemble_teachers {name} was trained with another normalization of the images than --teacher: "
                "choose one that was trained on the same data"
            )
        notes = normalized.notes[len(data.notes) :]
        print_notes(f"teacher {name}", notes)
        data.notes.extend(notes)
        teachers.append(teacher)
    return teachers


# ---- a classifier in a folder ----


def trained_folder(name: str) -> Path | None:
    """The folder of a trained classifier: NAME itself, the teacher or student of the run NAME, or `pretrained:NAME`.

    None if NAME is not a path. Raises UserError for a path without a classifier, and for an unknown pretrained name.
    """
    if name.startswith(PRETRAINED):
        return pretrained_folder(name)
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
        raise UserError(f"{name} is a file: {FILE_ADVICE}")
    is_network = name.startswith((TIMM, TRANSFORMERS)) or HUB_NAME.fullmatch(name)
    if "/" in name and not is_network:
        raise UserError(f"there is no folder {shorten(name)}: train_teacher.py --output_dir FOLDER creates one")
    return None


def load_trained(
    folder: Path, data: ImageData, any_labels: bool = False, kinds: Kinds = (ImageClassifierConfig,)
) -> tuple[Any, ImageData]:
    """Loads the classifier of a folder. Returns it with the data in its normalization.

    Its labels may be in another order. Raises UserError for another kind of model, another image size and, unless
    `any_labels`, other labels.
    """
    config = trained_config(folder, kinds)
    order, notes = (None, []) if any_labels else label_order(str(folder), config.label_names, data)
    data = in_normalization_of(config, folder, data)
    with reading(folder, "an image classifier of this project"):
        model = load_model(AutoModelForImageClassification, folder)
    if order is not None:
        reorder(str(folder), model, order, data)
    return model, replace(data, notes=[*data.notes, *notes])


def in_normalization_of(config: Any, folder: Path | str, data: ImageData) -> ImageData:
    """The data in the normalization of the model in a folder. Raises UserError for images of another size than its
    `config` has.
    """
    if config.image_size != data.size:
        raise UserError(
            f"{folder} was trained on images of {config.image_size} pixels, {data.name} has {data.size}: pass "
            f"--image_size {config.image_size}"
        )
    return replace(data, mean=config.mean or data.mean, std=config.std or data.std)


def trained_config(folder: Path, kinds: Kinds = (ImageClassifierConfig,)) -> Any:
    """The configuration of a classifier's folder. Raises UserError if it is of none of the `kinds`."""
    with reading(folder, "an image classifier of this project"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if not isinstance(config, kinds):
        raise UserError(f"{folder} holds a {config.model_type}, not an image classifier of this project")
    return config
