"""What a frozen text encoder makes of texts: embeddings, and codes under a bottleneck's keys."""

import torch
from datasets import Dataset
from torch import Tensor

from common.filling import CodeDataset
from common.inference import Collate, over_dataset
from nlp.student_model.bottleneck_classifier import BottleneckClassifier

FIT_TEXTS = 20_000  # keys are fitted on the embeddings of at most so many texts


def code_dataset(codes: list[Tensor], tokens: Dataset) -> CodeDataset:
    return CodeDataset(codes, torch.tensor(tokens["labels"]), torch.tensor(tokens["sample_id"]))


def embed_texts(model: BottleneckClassifier, texts: Dataset, collate: Collate, precision: str) -> list[Tensor]:
    """The frozen encoder's embedding of each text: (hidden,), or (positions, hidden) with `tokens` pooling."""

    def embed(**batch: Tensor) -> dict[str, Tensor]:
        return {"embedding": model.embed(**batch)}

    return over_dataset(model, embed, texts, collate, precision, description="embedding")["embedding"]


def encode_texts(model: BottleneckClassifier, texts: Dataset, collate: Collate, precision: str) -> list[Tensor]:
    """The codes of each text, uint16, under the frozen encoder and keys."""

    def encode(**batch: Tensor) -> dict[str, Tensor]:
        return {"codes": model.bottleneck.encode(model.embed(**batch)).to(torch.uint16)}

    return over_dataset(model, encode, texts, collate, precision, description="encoding")["codes"]
