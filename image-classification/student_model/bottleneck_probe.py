"""A frozen encoder with a head after it: a discrete key-value bottleneck or, as its contrast, a linear probe.

Traeuble et al., "Discrete Key-Value Bottleneck", ICML 2023 (arXiv:2207.11240), with random projections before the keys
and values that are logits and are averaged over the codebooks.
"""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForImageClassification

from kd.common.bottleneck.classifier import FrozenEncoderConfig, FrozenEncoderModel
from kd.common.bottleneck.module import DiscreteKeyValueBottleneck
from kd.common.outputs import Outputs
from kd.common.utils.errors import UserError
from kd.image_classification.data.loading import ImageData
from kd.image_classification.teacher_model.classifier import ImageClassifier
from kd.image_classification.teacher_model.teacher import load_trained, trained_folder

PIXELS = "pixels"  # no encoder: the pixels are the embedding


class BottleneckProbeConfig(FrozenEncoderConfig):
    """Configuration of a frozen encoder and of the head after it.

    encoder_config: of an ImageClassifier, whose pooled features are the embedding; None: the pixels are.
    image_size, mean, std: as in ImageClassifierConfig.
    bottleneck: codebooks, pairs and key_dim of a `DiscreteKeyValueBottleneck`; None: the head is linear.
    """

    model_type = "bottleneck_probe"
    image_size: int = 32
    mean: list[float] | None = None
    std: list[float] | None = None


class BottleneckProbe(FrozenEncoderModel):
    """Images (batch, 3, h, w) -> frozen encoder -> embedding (batch, width) -> head -> logits (batch, labels).

    The head is a bottleneck with random projections whose values are logits and are averaged or, as its contrast, a
    linear layer; both start at zero. Loads alone, once this module is imported:

        model = BottleneckProbe.from_pretrained("runs/image-classification/bottleneck_class_incremental/student")
    """

    config_class = BottleneckProbeConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"

    def __init__(self, config: BottleneckProbeConfig) -> None:
        super().__init__(config)
        self.channels = len(config.mean or [0.0])  # grey images come as three equal channels
        width, self.encoder = self.channels * config.image_size**2, None
        if config.encoder_config is not None:
            self.encoder = ImageClassifier(config.encoder_config)
            width = _input_width(self.encoder.head)
            self.encoder.head = nn.Identity()  # it may be of other classes
        self.head: DiscreteKeyValueBottleneck | nn.Linear
        if config.bottleneck is not None:
            shape = {"split": "projection", "decoder": "mean", **config.bottleneck}
            self.head = DiscreteKeyValueBottleneck(width, config.num_labels, **shape)  # type: ignore[arg-type]
        else:
            self.head = nn.Linear(width, config.num_labels or 1)
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
        self.post_init()
        self.train(False)

    @classmethod
    def around(
        cls, encoder: ImageClassifier | None, data: ImageData, bottleneck: dict[str, int] | None
    ) -> "BottleneckProbe":
        """An untrained head for the classes of `data` after an encoder, whose weights are copied, or after pixels."""
        encoder_config = encoder.config if encoder is not None else None
        model = cls(BottleneckProbeConfig(encoder_config=encoder_config, bottleneck=bottleneck, **data.config))
        if encoder is not None:
            model.copy_encoder(encoder, without="head")
        return model

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: every part comes initialized from its constructor, and every checkpoint is complete."""

    @property
    def bottleneck(self) -> DiscreteKeyValueBottleneck:
        assert isinstance(self.head, DiscreteKeyValueBottleneck), "the head is linear"
        return self.head

    @torch.no_grad()
    def embed(self, pixel_values: Tensor) -> Tensor:
        """Embeddings (batch, width) of images (batch, 3, h, w), in fp32."""
        if self.encoder is None:
            return rearrange(pixel_values[:, : self.channels], "batch c h w -> batch (c h w)").float()
        return self.encoder(pixel_values).features["pooled"].float()

    def forward(self, pixel_values: Tensor, return_dict: bool | None = None) -> Outputs:
        return Outputs(logits=self.head(self.embed(pixel_values)))

    def cache(self, embeddings: Tensor) -> Tensor:
        """The inputs of the head that training reuses: codes (images, codebooks) uint16 of the embeddings (images,
        width), or for a linear head the embeddings.
        """
        if isinstance(self.head, nn.Linear):
            return embeddings
        parts = tqdm(embeddings.split(2048), desc="encoding", leave=False, disable=len(embeddings) < 5000)
        return torch.cat([self.head.encode(part.to(self.device)).to(torch.uint16).cpu() for part in parts])

    def classify(self, cached: Tensor) -> Tensor:
        """Logits (batch, labels) of rows of `cache`: without encoder, without search."""
        cached = cached.to(self.device)
        return self.head(cached) if isinstance(self.head, nn.Linear) else self.head.decode(cached)


def _input_width(head: Any) -> int:
    return head.in_features if isinstance(head, nn.Linear) else head.dim


AutoConfig.register(BottleneckProbeConfig.model_type, BottleneckProbeConfig)
AutoModelForImageClassification.register(BottleneckProbeConfig, BottleneckProbe)


def load_encoder(name: str, data: ImageData) -> tuple[ImageClassifier | None, ImageData]:
    """The classifier of a folder (None: the pixels) and the data in the normalization that it was trained with.

    Which classes it was trained on does not matter; images must be of its size.
    """
    if name == PIXELS:
        return None, data
    folder = trained_folder(name)
    if folder is None:
        raise UserError(f"unknown encoder {name!r}: give {PIXELS}, or the folder of a trained image classifier")
    return load_trained(folder, data, any_labels=True)
