"""Where a teacher comes from, if the run does not train it: the folder of a classifier of the same labels."""

from pathlib import Path

from kd.common.pretrained import load_model, reading
from kd.common.utils.errors import UserError
from kd.common.utils.files import read_json
from kd.example_domain.data.loading import LabelledData
from kd.example_domain.teacher_model.classifier import Classifier, ClassifierConfig


def load_trained(folder: str, data: LabelledData) -> Classifier:
    """The classifier in a folder. Raises UserError for another kind of model, and for one of other labels."""
    if not Path(folder, "config.json").exists():
        raise UserError(f"no classifier in folder {folder}: it has no config.json; distill.py makes one")
    with reading(folder, "a classifier"):
        config = ClassifierConfig.from_dict(read_json(Path(folder, "config.json")))
    if config.model_type != ClassifierConfig.model_type:
        raise UserError(
            f"{folder} holds a {config.model_type}, not a classifier of example-domain: distill.py makes one"
        )
    if config.label_names != data.label_names:
        raise UserError(f"{folder} knows the labels {config.label_names}, but {data.name} has {data.label_names}")
    with reading(folder, "a classifier"):
        return load_model(Classifier, folder)
