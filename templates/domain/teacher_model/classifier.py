"""The network, teacher or student: convolutions over time, their mean, a linear layer.

Loads alone:

    from kd.example_domain.teacher_model.classifier import Classifier
    model = Classifier.from_pretrained("runs/example-domain/distill/student")
"""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from kd.common.outputs import Outputs


class ClassifierConfig(PreTrainedConfig):
    """`width`: channels of each layer; `layers`: how many, each halving the time axis."""

    model_type = "example_domain"
    width: int = 32
    layers: int = 3

    @property
    def label_names(self) -> list[str]:
        """By class id."""
        names: dict[Any, str] = dict(self.id2label or {})
        return [names[i] for i in range(len(names))]


class Classifier(PreTrainedModel):
    """Signals (batch, length) -> logits (batch, classes). Feature: `pooled` (batch, width), what the head sees."""

    config_class = ClassifierConfig
    main_input_name = "values"

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__(config)
        layers: list[nn.Module] = [nn.BatchNorm1d(1)]  # learns the scale of the data, and ships with the model
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
        """Nothing: every layer comes initialized from its constructor, and every checkpoint is complete."""

    def forward(self, values: Tensor) -> Outputs:
        pooled = self.backbone(values.unsqueeze(1)).mean(2)  # (batch, 1, length) -> (batch, width, time) -> mean
        return Outputs(logits=self.head(pooled), features={"pooled": pooled})


def new_classifier(label_names: list[str], width: int) -> Classifier:
    """A classifier with random weights."""
    return Classifier(ClassifierConfig(width=width, id2label=dict(enumerate(label_names))))
