"""Discrete key-value bottlenecks of image classifiers.

`replace_head` replaces the head of a classifier by a bottleneck. `BottleneckProbe` is a bottleneck or, for comparison,
a linear layer after a frozen encoder or after the pixels. It follows Traeuble et al., "Discrete Key-Value Bottleneck",
ICML 2023 (arXiv:2207.11240): the keys are searched after random projections, and the values are logits, which are
averaged over the codebooks.
"""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForImageClassification

from kd.common.bottleneck.module import DiscreteKeyValueBottleneck
from kd.common.bottleneck.training import FrozenEncoderConfig, FrozenEncoderModel, Samples, train_bottleneck
from kd.common.data.fingerprints import data_fingerprint
from kd.common.methods import labels, labels_and_soft_targets
from kd.common.outputs import Outputs
from kd.common.training.arguments import Keys
from kd.common.training.inference import identity_collate, run_inference
from kd.common.training.teacher_outputs import TeacherOutputs
from kd.common.utils.devices import best_device
from kd.common.utils.errors import UserError
from kd.image_classification.data.image_data import ImageData
from kd.image_classification.student_model.arguments import PIXELS, ImageBottleneckArguments
from kd.image_classification.student_model.distillation import ImageRun, read_stage
from kd.image_classification.student_model.evaluation import image_processor, trainer_metrics
from kd.image_classification.teacher_model.classifier import ImageClassifier, ImageClassifierConfig
from kd.image_classification.teacher_model.teacher import load_trained, trained_folder

VALUE_LEARNING_RATE = 3e-2
BATCH_SIZE = 250  # for inference with the frozen networks


# ---- a bottleneck instead of a head ----


def with_bottleneck(encoder: ImageClassifier, shape: dict[str, Any]) -> ImageClassifier:
    """A copy of the classifier with an untrained bottleneck instead of its head."""
    config = ImageClassifierConfig(**{**encoder.config.to_dict(), "bottleneck": shape})
    model = ImageClassifier(config)
    weights = {name: w for name, w in encoder.state_dict().items() if not name.startswith("head.")}
    model.load_state_dict({**model.state_dict(), **weights})
    return model


def replace_head(
    run: ImageRun,
    data: ImageData,
    stage: str,
    encoder: ImageClassifier,
    arguments: ImageBottleneckArguments,
    keys: Keys,
    teacher: ImageClassifier | None = None,
) -> ImageClassifier:
    """Replaces the head of a frozen classifier by a bottleneck and trains it, or loads the stage if it is finished.

    Keys are fitted without labels. Unless they are `reused`, the values are then trained on the labels and on the soft
    targets of a `teacher`, or count the labels. Carried and reused keys come from the bottleneck of the `teacher`.
    """
    args = run.args

    def train() -> ImageClassifier:
        method, outputs, used = labels(), None, data.labelled_train()
        if teacher is not None and arguments.has_soft_targets:
            method, used = labels_and_soft_targets(args.alpha, args.temperature), data
            outputs = cached_logits(run, data, teacher)
        method = method.for_labels(used.splits["train"].labels)
        return train_bottleneck(
            run,
            stage,
            with_bottleneck(encoder, arguments.shape()),
            keys,
            None if teacher is None else teacher.bottleneck,
            arguments.value_arguments(args.value_learning_rate or VALUE_LEARNING_RATE),
            _samples(used, "train"),
            _samples(data, "validation") if "validation" in data.splits else None,
            batch_size=BATCH_SIZE,
            samples=len(data.splits["train"]),
            objective=method.objective,
            teacher_outputs=outputs,
            compute_metrics=trainer_metrics,
        )

    return run.stage(stage, train, read_stage, image_processor(data))


def _samples(data: ImageData, split: str) -> Samples:
    labels = data.splits[split].labels
    fingerprint = data_fingerprint([data.fingerprint, data.config, split, len(labels)])
    return Samples(data.views(split, best_device()), identity_collate, labels, torch.arange(len(labels)), fingerprint)


def cached_logits(run: ImageRun, data: ImageData, teacher: ImageClassifier) -> TeacherOutputs:
    """Computes the teacher's logits for the training images, without augmentation."""

    def logits(**batch: Tensor) -> dict[str, Tensor]:
        return {"logits": teacher(**batch).logits.float()}

    views = data.views("train", best_device())
    with run.timed("teacher_outputs"):
        outputs = run_inference(
            teacher, logits, views, identity_collate, run.args.precision, BATCH_SIZE, description="teacher"
        )
    return TeacherOutputs(torch.arange(len(views)), torch.stack(outputs["logits"]))


# ---- a probe after a frozen encoder ----


class BottleneckProbeConfig(FrozenEncoderConfig):
    """Configuration of a frozen encoder and of the head after it.

    encoder_config: configuration of the ImageClassifier whose pooled features are the embedding; None if the pixels
        are the embedding.
    image_size, mean, std: as in ImageClassifierConfig.
    bottleneck: codebooks, codebook_size, key_dim and values of the `DiscreteKeyValueBottleneck`; None for a linear
        head.
    """

    model_type = "bottleneck_probe"
    label_names = ImageClassifierConfig.label_names
    image_size: int = 32
    mean: list[float] | None = None
    std: list[float] | None = None


class BottleneckProbe(FrozenEncoderModel):
    """Images (batch, 3, h, w) -> frozen encoder -> embedding (batch, width) -> head -> logits (batch, labels).

    The head is a bottleneck with random projections and the mean decoder, or a linear layer. Both start at zero. The
    saved model contains the encoder, and loads in any process that imports this module:

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
            self.encoder.head = nn.Identity()  # its classes may differ
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
    def from_encoder(
        cls, encoder: ImageClassifier | None, data: ImageData, bottleneck: dict[str, Any] | None
    ) -> "BottleneckProbe":
        """An untrained head for the classes of `data`, after a copy of the encoder or (None) after the pixels."""
        encoder_config = encoder.config if encoder is not None else None
        model = cls(BottleneckProbeConfig(encoder_config=encoder_config, bottleneck=bottleneck, **data.config))
        if encoder is not None:
            model.copy_encoder(encoder, without="head")
        return model

    def _init_weights(self, module: nn.Module) -> None:
        """Does nothing: constructors initialize all parts, and every checkpoint is complete."""

    @property
    def bottleneck(self) -> DiscreteKeyValueBottleneck:
        assert isinstance(self.head, DiscreteKeyValueBottleneck), "the head is linear"
        return self.head

    @property
    def is_counted(self) -> bool:
        """Whether the head is a bottleneck with counted values."""
        return isinstance(self.head, DiscreteKeyValueBottleneck) and self.head.label_counts is not None

    @torch.no_grad()
    def embed(self, pixel_values: Tensor) -> Tensor:
        """Embeddings (batch, width) of images (batch, 3, h, w), in fp32."""
        if self.encoder is None:
            return rearrange(pixel_values[:, : self.channels], "batch c h w -> batch (c h w)").float()
        return self.encoder(pixel_values).features["pooled"].float()

    def forward(self, pixel_values: Tensor, return_dict: bool | None = None) -> Outputs:
        return Outputs(logits=self.head(self.embed(pixel_values)))

    def cache(self, embeddings: Tensor) -> Tensor:
        """Maps embeddings (images, width) to the inputs of the head that training caches: codes (images, codebooks)
        uint16 or, for a linear head, the embeddings themselves.
        """
        if isinstance(self.head, nn.Linear):
            return embeddings
        parts = tqdm(embeddings.split(2048), desc="encoding", leave=False, disable=len(embeddings) < 5000)
        return torch.cat([self.head.encode(part.to(self.device)).to(torch.uint16).cpu() for part in parts])

    def classify(self, cached: Tensor) -> Tensor:
        """Logits (batch, labels) for rows of the output of `cache`, without encoder and key search."""
        cached = cached.to(self.device)
        return self.head(cached) if isinstance(self.head, nn.Linear) else self.head.decode(cached)


def _input_width(head: Any) -> int:
    return head.in_features if isinstance(head, nn.Linear) else head.dim


AutoConfig.register(BottleneckProbeConfig.model_type, BottleneckProbeConfig)
AutoModelForImageClassification.register(BottleneckProbeConfig, BottleneckProbe)


def load_encoder(name: str, data: ImageData) -> tuple[ImageClassifier | None, ImageData]:
    """Loads the classifier in a folder, or None for the pixels. Returns it with the data in its normalization.

    The classifier may have been trained on other classes. Raises UserError for an unknown name, and for a classifier
    of images of another size.
    """
    if name == PIXELS:
        return None, data
    folder = trained_folder(name)
    if folder is None:
        raise UserError(f"unknown --encoder {name!r}: pass {PIXELS} or the folder of a trained image classifier")
    return load_trained(folder, data, any_labels=True)
