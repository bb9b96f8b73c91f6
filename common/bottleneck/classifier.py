"""Base of the classifiers that ship with a frozen encoder: what a bottleneck after an encoder needs in any domain."""

from typing import Any

from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel


class FrozenEncoderConfig(PreTrainedConfig):
    """Configuration of a frozen encoder and of the bottleneck after it.

    bottleneck: arguments of `DiscreteKeyValueBottleneck` other than width and number of outputs.
    """

    sub_configs = {"encoder_config": AutoConfig}
    encoder_config: Any = None
    bottleneck: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.encoder_config, dict):
            self.encoder_config = AutoConfig.for_model(**self.encoder_config)
        super().__post_init__(**kwargs)


class FrozenEncoderModel(PreTrainedModel):
    """Frozen encoder -> embedding -> bottleneck (or another head) -> logits.

    The encoder is trained elsewhere (on labels, or to match a teacher) and frozen here: keys are only valid while the
    embeddings do not change.
    """

    encoder: Any  # a frozen module, or None where the inputs are the embeddings

    def train(self, mode: bool = True) -> Any:
        """The frozen encoder stays in eval mode: dropout or batch statistics would move the embeddings."""
        super().train(mode)
        if self.encoder is not None:
            self.encoder.eval().requires_grad_(False)
        return self

    def copy_encoder(self, encoder: nn.Module, without: str) -> None:
        """Copies the weights of an encoder, except those of its submodule `without`."""
        weights = {name: w for name, w in encoder.state_dict().items() if not name.startswith(f"{without}.")}
        self.encoder.load_state_dict(weights)
