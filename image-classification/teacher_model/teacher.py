"""Where a teacher comes from: an architecture to train, a folder, or timm's pretrained networks."""

from dataclasses import replace
from pathlib import Path

from transformers import AutoConfig

from kd.common.pretrained import load_model, reading, short
from kd.common.utils.errors import UserError
from kd.image_classification.data.loading import ImageData
from kd.image_classification.teacher_model.backbones import TIMM
from kd.image_classification.teacher_model.classifier import ImageClassifier, ImageClassifierConfig, new_classifier
from kd.image_classification.teacher_model.pretrained import pretrained_classifier

IMAGENET_CLASSES = 1000  # whose order is that of their WordNet ids, everywhere


def trained_folder(name: str, student_first: bool = False) -> Path | None:
    """The folder of a trained classifier: NAME itself, or the teacher (else the student) of the run NAME, or the other
    way round.
    """
    of_run = [Path(name, "stages", "teacher"), Path(name, "student")]
    try:
        for folder in (Path(name), *(reversed(of_run) if student_first else of_run)):
            if (folder / "config.json").exists():
                return folder
        is_folder, is_file = Path(name).is_dir(), Path(name).is_file()
    except OSError as error:
        raise UserError(f"cannot read folder {short(name)}: {error.strerror}") from error
    if is_folder:
        raise UserError(f"no classifier in folder {name}: it has no config.json; train_teacher.py makes one")
    if is_file:
        raise UserError(
            f"{name} is a file: pass the folder of a classifier that train_teacher.py made, the name of a network to "
            f"train, or {TIMM}NAME; of a file of timm's weights pretrained_classifier(NAME, checkpoint=...) and "
            "save_pretrained make a folder"
        )
    if "/" in name and not name.startswith(TIMM):
        raise UserError(f"there is no folder {short(name)}: train_teacher.py --output_dir FOLDER makes one")
    return None


def load_trained(folder: Path, data: ImageData, any_labels: bool = False) -> tuple[ImageClassifier, ImageData]:
    """The classifier of a folder, and the data in the normalization that it was trained with.

    Raises UserError for another kind of model, another size of images and, unless `any_labels`, another label order.
    """
    config = trained_config(folder)
    if not any_labels:
        _refuse_other_labels(folder, config.label_names, data)
    if config.image_size != data.size:
        raise UserError(
            f"{folder} was trained on images of {config.image_size} pixels, {data.name} has {data.size}: pass "
            f"--image_size {config.image_size}"
        )
    with reading(folder, "an image classifier of this project"):
        model = load_model(ImageClassifier, folder)
    return model, replace(data, mean=config.mean or data.mean, std=config.std or data.std)


def trained_config(folder: Path) -> ImageClassifierConfig:
    """That of a classifier's folder. Raises UserError for another kind of model."""
    with reading(folder, "an image classifier of this project"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if not isinstance(config, ImageClassifierConfig):
        raise UserError(f"{folder} holds a {config.model_type}, not an image classifier of this project")
    return config


def given_teacher(name: str, data: ImageData) -> tuple[ImageClassifier, ImageData] | None:
    """A classifier that is trained already, and the data in the normalization that it was trained with: that of a
    folder, or timm's pretrained one where the data have ImageNet's classes. None for an architecture still to train.
    """
    folder = trained_folder(name)
    if folder:
        return load_trained(folder, data)
    if name.startswith(TIMM) and len(data.label_names) == IMAGENET_CLASSES:
        model = pretrained_classifier(name.removeprefix(TIMM), label_names=data.label_names, image_size=data.size)
        return model, replace(data, mean=model.config.mean, std=model.config.std)
    return None


def teacher_sketch(name: str, data: ImageData) -> tuple[ImageClassifier, ImageData]:
    """The given teacher, or an untrained one of that architecture: enough to refuse what cannot fit before anything is
    written or trained.
    """
    return given_teacher(name, data) or (new_classifier(name, data.config), data)


def _refuse_other_labels(folder: Path, own: list[str], data: ImageData) -> None:
    if own == data.label_names:
        return
    if sorted(own) == sorted(data.label_names):
        first = next(i for i, (a, b) in enumerate(zip(own, data.label_names, strict=True)) if a != b)
        raise UserError(
            f"the label order of {folder} differs from that of {data.name}: label {first} is {own[first]!r} for this "
            f"model and {data.label_names[first]!r} in the data"
        )
    raise UserError(
        f"{folder} knows {len(own)} labels ({', '.join(own[:3])}, ...), {data.name} has {len(data.label_names)} "
        f"({', '.join(data.label_names[:3])}, ...): name a teacher of the same labels"
    )
