"""Embeddings of texts and images by frozen encoders, cached in a file, for `forgetting.py` and `streams.py`."""

import hashlib
import json
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from kd.common.bottleneck.training import embed_samples
from kd.common.training.inference import LengthGroupedSampler, identity_collate
from kd.common.utils.devices import autocast, best_device, resolve_precision
from kd.common.utils.errors import UserError
from kd.common.utils.files import read_json
from kd.image_classification.data.loading import load_image_data
from kd.image_classification.student_model.bottleneck import BottleneckProbe, load_encoder
from kd.image_classification.teacher_model.published import Normalization, load_weights
from kd.nlp.data.loading import Texts, load_text_data
from kd.nlp.student_model.bottleneck_classifier import BottleneckClassifier
from kd.nlp.teacher_model.teacher import Pretrained, load_classifier

CIFAR10 = 10  # classes of the published networks
TUNING_EPOCHS, TUNING_RATE, TUNING_BATCH = 3, 1e-4, 32  # of AdamW, for an encoder that is fine-tuned on some classes


@dataclass(frozen=True)
class Source:
    """A dataset and the encoder that embeds it.

    encoder: texts: Hub name or folder; images: weights of a ResNet56 for CIFAR-10 (a `.pt` file), a classifier of this
        project, or None for the pixels.
    images: maximum number of images of each split.
    validation_share: of train, moved to a missing validation split of images. Texts: always a tenth.
    tuned_on: names of the classes on whose training texts the encoder is fine-tuned first.
    """

    kind: str
    dataset: str
    encoder: str | None
    images: int
    label_column: str | None = None
    validation_share: float = 0
    tuned_on: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(astuple(self)).encode()).hexdigest()[:8]


def embeddings(source: Source, cache: str) -> tuple[dict[str, Tensor], list[str]]:
    """Embeddings (rows, width) and labels (rows,) of each split, as `train` and `train_labels`; the class names."""
    file = Path(cache) / f"{Path(source.dataset).name}_{source.digest}.safetensors"
    if not file.exists():
        found, names = embed_texts(source) if source.kind == "texts" else embed_images(source)
        file.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: part.contiguous() for name, part in found.items()}
        save_file(tensors, file, {"label_names": json.dumps(names)})
    with safe_open(file, "pt") as stored:
        return {name: stored.get_tensor(name) for name in stored.keys()}, json.loads(stored.metadata()["label_names"])


def read_domains(file: str, names: list[str]) -> list[Tensor]:
    """The ids of the classes of each domain, from a JSON file of class names by domain. Raises UserError unless each
    class is there once.
    """
    domains: list[list[str]] = list(read_json(file).values())
    if sorted(sum(domains, [])) != sorted(names):
        raise UserError(f"--domains {file} must have each class of the dataset once")
    return [torch.tensor([names.index(name) for name in members]) for members in domains]


def embed_texts(source: Source) -> tuple[dict[str, Tensor], list[str]]:
    """Mean hidden states of the encoder, which is fine-tuned only on the classes `tuned_on`. In fp32, as `forget.py`
    embeds texts; those of a fine-tuned encoder in the precision of its training.
    """
    classifier, texts = tokenized(source)
    data = texts.data
    if source.tuned_on:
        fine_tune(classifier.model, texts, [data.label_names.index(name) for name in source.tuned_on])
    precision = resolve_precision("auto") if source.tuned_on else "fp32"
    model = BottleneckClassifier.from_encoder(classifier.encoder, {0: "none"}, "mean", codebooks=1, codebook_size=1)
    found = {}
    for split, rows in texts.splits.items():
        found[split] = torch.stack(embed_samples(model, rows, texts.collate, precision)).cpu()
        found[f"{split}_labels"] = torch.tensor(rows["labels"])
    return found, data.label_names


def tokenized(source: Source) -> tuple[Pretrained, Texts]:
    """The encoder, as a classifier with an untrained head, and the texts in its tokens."""
    if source.encoder is None:
        raise UserError("texts need --encoder NAME, a Hub name or folder")
    data = load_text_data(source.dataset, label_column=source.label_column)
    classifier = load_classifier(source.encoder, data)
    return classifier, Texts.of(data, classifier.tokenizer)


def fine_tune(model: Any, texts: Texts, labels: list[int]) -> None:
    """Trains a classifier in place on the training texts of some classes. Its head is not used afterwards."""
    chosen = torch.isin(torch.tensor(texts.train["labels"]), torch.tensor(labels)).nonzero().flatten()
    rows = texts.train.select(chosen.tolist())
    device, precision = best_device(), resolve_precision("auto")
    model.to(device).train().set_attn_implementation("eager")  # the faster one for short texts in bf16 on a CPU
    optimizer = torch.optim.AdamW(model.parameters(), TUNING_RATE)
    sampler = LengthGroupedSampler(rows["length"], TUNING_BATCH, seed=0)
    for epoch in tqdm(range(TUNING_EPOCHS), desc="fine-tuning", leave=False):
        sampler.set_epoch(epoch)
        for part in torch.tensor(list(sampler)).split(TUNING_BATCH):
            batch = {name: value.to(device) for name, value in texts.collate([rows[i] for i in part.tolist()]).items()}
            targets = batch.pop("labels")
            inputs = {name: batch[name] for name in texts.collate.tokenizer.model_input_names}
            with autocast(device, precision):
                loss = F.cross_entropy(model(**inputs).logits.float(), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def embed_images(source: Source) -> tuple[dict[str, Tensor], list[str]]:
    """Pixels, or pooled features of the encoder."""
    data = load_image_data(
        source.dataset,
        label_column=source.label_column,
        max_train_samples=source.images,
        max_eval_samples=source.images,
        validation_share=source.validation_share,
    )
    encoder, precision = None, resolve_precision("auto")
    if source.encoder is not None and source.encoder.endswith(".pt"):
        ten_classes = replace(data, label_names=[str(label) for label in range(CIFAR10)])
        encoder, normalized = load_weights("resnet56a", source.encoder, ten_classes, Normalization())
        data = replace(data, mean=normalized.mean, std=normalized.std)
    elif source.encoder is not None:
        encoder, data = load_encoder(source.encoder, data)
    model: Any = BottleneckProbe.from_encoder(encoder, data, None)
    found = {}
    for split, images in data.splits.items():
        views = data.views(split, best_device())
        found[split] = torch.stack(embed_samples(model, views, identity_collate, precision, 250)).cpu()
        found[f"{split}_labels"] = images.labels
    return found, data.label_names
