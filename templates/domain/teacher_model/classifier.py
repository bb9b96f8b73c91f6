"""The network of teacher and student: convolutions over time, mean pooling, and a linear layer.

A saved model loads with:

    from kd.example_domain.teacher_model.classifier import Classifier
    model = Classifier.from_pretrained("runs/example-domain/distill/student")
"""

from pathlib import Path
from typing import Any

from einops import rearrange, reduce
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from kd.common.outputs import Outputs
from kd.common.pretrained import load_model, reading
from kd.common.utils.errors import UserError
from kd.common.utils.files import read_json
from kd.example_domain.data.loading import LabelledData


class ClassifierConfig(PreTrainedConfig):
    """`width`: channels of each layer. `layers`: number of convolutions, each with stride 2."""

    model_type = "example_domain"
    width: int = 32
    layers: int = 3

    @property
    def label_names(self) -> list[str]:
        """Class names by id."""
        names: dict[Any, str] = dict(self.id2label or {})
        return [names[i] for i in range(len(names))]


class Classifier(PreTrainedModel):
    """Signals (batch, length) -> logits (batch, classes). Feature: `pooled` (batch, width), the input of the head."""

    config_class = ClassifierConfig
    main_input_name = "values"

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__(config)
        layers: list[nn.Module] = [nn.BatchNorm1d(1)]  # normalizes the data as a part of the model
        for number in range(config.layers):
            channels = config.width if number else 1
            layers += [
                nn.Conv1d(channels, config.width, 7, stride=2, padding=3),
                nn.BatchNorm1d(config.width),
                nn.ReLU(),
            ]
        self.backbone = nn.Sequential(*layers)
        self.head = nn.Linear(config.width, len(config.label_names))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Keeps the initialization of PyTorch's layers."""

    def forward(self, values: Tensor) -> Outputs:
        maps = self.backbone(rearrange(values, "batch length -> batch 1 length"))
        pooled = reduce(maps, "batch width time -> batch width", "mean")
        return Outputs(logits=self.head(pooled), features={"pooled": pooled})


def new_classifier(label_names: list[str], width: int) -> Classifier:
    """A classifier with random weights."""
    return Classifier(ClassifierConfig(width=width, id2label=dict(enumerate(label_names))))


def read_config(folder: str) -> ClassifierConfig:
    """The configuration of a classifier. Raises UserError if the folder has another kind of model."""
    if not Path(folder, "config.json").exists():
        raise UserError(f"no classifier in folder {folder}: it has no config.json; pass a student of distill.py")
    with reading(folder, "a classifier"):
        config = ClassifierConfig.from_dict(read_json(Path(folder, "config.json")))
    if config.model_type != ClassifierConfig.model_type:
        raise UserError(
            f"{folder} holds a {config.model_type}, not a model of example-domain: pass a student of distill.py"
        )
    return config


def load_trained(folder: str, data: LabelledData) -> Classifier:
    """Loads a classifier. Raises UserError if the folder has another kind of model, or if its labels differ from the
    data's.
    """
    config = read_config(folder)
    if config.label_names != data.label_names:
        raise UserError(
            f"{folder} has the labels {config.label_names}, but {data.name} has {data.label_names}: pass the "
            "--dataset that it was trained on"
        )
    with reading(folder, "a classifier"):
        return load_model(Classifier, folder)
