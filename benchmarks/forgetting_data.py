"""Embeddings of texts and images by frozen encoders, cached in a file, for `forgetting.py`."""

import hashlib
import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kd.common.bottleneck.training import embed_samples
from kd.common.training.inference import identity_collate
from kd.common.utils.devices import best_device, resolve_precision
from kd.common.utils.errors import UserError
from kd.image_classification.data.loading import load_image_data
from kd.image_classification.student_model.bottleneck import BottleneckProbe
from kd.image_classification.teacher_model.published import Normalization, load_weights
from kd.nlp.data.loading import Texts, load_text_data
from kd.nlp.student_model.bottleneck_classifier import BottleneckClassifier
from kd.nlp.teacher_model.teacher import load_classifier

SPLITS = "train", "test"
CIFAR10 = 10  # classes of the published networks


def embeddings(args: Namespace) -> dict[str, Tensor]:
    """Embeddings (rows, width) and labels (rows,) by split: train, test, train_labels, test_labels."""
    source = [args.kind, str(args.dataset), str(args.encoder), str(args.images)]
    digest = hashlib.sha256(json.dumps(source).encode()).hexdigest()[:8]
    file = Path(args.cache) / f"{Path(args.dataset).name}_{digest}.safetensors"
    if not file.exists():
        found = embed_texts(args) if args.kind == "texts" else embed_images(args)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: part.contiguous() for name, part in found.items()}, file)
    return load_file(file)


def embed_texts(args: Namespace) -> dict[str, Tensor]:
    """Mean hidden states of the encoder, which is not fine-tuned."""
    if args.encoder is None:
        raise UserError("texts need --encoder NAME, a Hub name or folder")
    data = load_text_data(args.dataset)
    classifier = load_classifier(args.encoder, data)
    texts = Texts.of(data, classifier.tokenizer)
    model = BottleneckClassifier.from_encoder(classifier.encoder, {0: "none"}, "mean", codebooks=1, codebook_size=1)
    found = {}
    for split in SPLITS:
        rows: Any = texts.splits[split]
        found[split] = torch.stack(embed_samples(model, rows, texts.collate, "fp32")).cpu()
        found[f"{split}_labels"] = torch.tensor(rows["labels"])
    return found


def embed_images(args: Namespace) -> dict[str, Tensor]:
    """Pixels or, with --encoder FILE, pooled features of a ResNet56 with published weights for CIFAR-10."""
    data = load_image_data(
        args.dataset, max_train_samples=args.images, max_eval_samples=args.images, validation_share=0
    )
    encoder, precision = None, resolve_precision("auto")
    if args.encoder is not None:
        ten_classes = replace(data, label_names=[str(label) for label in range(CIFAR10)])
        encoder, normalized = load_weights("resnet56a", args.encoder, ten_classes, Normalization())
        data = replace(data, mean=normalized.mean, std=normalized.std)
    model: Any = BottleneckProbe.from_encoder(encoder, data, None)
    found = {}
    for split in SPLITS:
        views = data.views(split, best_device())
        found[split] = torch.stack(embed_samples(model, views, identity_collate, precision, 250)).cpu()
        found[f"{split}_labels"] = data.splits[split].labels
    return found
