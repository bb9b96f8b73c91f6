"""A text classifier with a discrete key-value bottleneck after a frozen encoder.

Importing this module registers the architecture with transformers' Auto classes:

    from kd.nlp.student_model.bottleneck_classifier import BottleneckClassifier
    model = BottleneckClassifier.from_pretrained("runs/NLP/keys_carried/student")
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from kd.common.bottleneck.module import DiscreteKeyValueBottleneck
from kd.common.bottleneck.training import FrozenEncoderConfig, FrozenEncoderModel
from kd.common.outputs import Outputs
from kd.nlp.student_model.pooling import Pooling, pool


class BottleneckConfig(FrozenEncoderConfig):
    """Configuration of a text encoder and of the bottleneck after it.

    pooling: Input of the bottleneck. `mean`: the mean over positions. `cls`: the first position. `tokens`: every
        position; the values of all positions are averaged.
    """

    model_type = "bottleneck_classifier"
    pooling: Pooling = "mean"


class BottleneckClassifier(FrozenEncoderModel):
    """Frozen encoder -> pooling -> bottleneck -> logits."""

    config_class = BottleneckConfig
    base_model_prefix = "encoder"
    main_input_name = "input_ids"

    def __init__(self, config: BottleneckConfig) -> None:
        super().__init__(config)
        self.encoder = AutoModel.from_config(config.encoder_config)
        if hasattr(self.encoder, "pooler"):
            self.encoder.pooler = None  # the input of the bottleneck is the hidden states
        self.bottleneck = DiscreteKeyValueBottleneck(
            config.encoder_config.hidden_size, config.num_labels or 1, **(config.bottleneck or {})
        )
        self.post_init()

    @classmethod
    def from_encoder(cls, encoder: nn.Module, labels: dict[int, str], pooling: Pooling, **bottleneck: Any) -> Any:
        """An untrained bottleneck after a copy of an encoder. `labels` is id2label."""
        config = BottleneckConfig(
            encoder_config=encoder.config,
            pooling=pooling,
            bottleneck=bottleneck,
            id2label=labels,
            label2id={name: i for i, name in labels.items()},
        )
        model = cls(config)
        model.copy_encoder(encoder, without="pooler")
        return model

    def _init_weights(self, module: nn.Module) -> None:
        """Initializes a bottleneck only if the checkpoint has none of its tensors: new and loaded ones must not be
        mixed.
        """
        if isinstance(module, DiscreteKeyValueBottleneck):
            if not any(getattr(p, "_is_hf_initialized", False) for p in [*module.parameters(), *module.buffers()]):
                module.reset()

    @torch.no_grad()
    def embed(self, input_ids: Tensor, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        """Embeddings (batch, hidden), or (batch, positions, hidden) with `tokens` pooling, in fp32."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **inputs).last_hidden_state
        return pool(hidden, attention_mask, self.config.pooling)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        codes: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> Outputs:
        """Logits (batch, labels) of texts, or of their cached codes (batch, codebooks) or (batch, positions,
        codebooks), which skip the encoder and the search for nearest keys.
        """
        if codes is None:
            if input_ids is None:
                raise ValueError("BottleneckClassifier needs input_ids or codes")
            attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
            codes = self.bottleneck.encode(self.embed(input_ids, attention_mask, **types))
        mask = attention_mask if codes.dim() == 3 else None
        return Outputs(logits=self.bottleneck.decode(codes, mask))


AutoConfig.register(BottleneckConfig.model_type, BottleneckConfig)
AutoModelForSequenceClassification.register(BottleneckConfig, BottleneckClassifier)
