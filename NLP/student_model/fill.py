"""Filling the bottleneck behind a frozen text encoder: keys on its embeddings, values on the codes of its texts."""

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from kd.common.bottleneck.codes import CodeDataset, Keys, set_keys
from kd.common.training.inference import Collate, identity_collate, run_inference
from kd.common.training.teacher_outputs import TeacherOutputs
from kd.common.utils.devices import best_device
from kd.nlp.data.tokenized import Texts
from kd.nlp.student_model.bottleneck_classifier import BottleneckClassifier
from kd.nlp.student_model.evaluation import trainer_metrics
from kd.nlp.student_model.pipeline import Pipeline

FIT_TEXTS = 20_000  # keys are fitted on the embeddings of at most so many texts


def code_dataset(codes: list[Tensor], tokens: Dataset) -> CodeDataset:
    return CodeDataset(codes, torch.tensor(tokens["labels"]), torch.tensor(tokens["sample_id"]))


def embed_texts(model: BottleneckClassifier, texts: Dataset, collate: Collate, precision: str) -> list[Tensor]:
    """The frozen encoder's embedding of each text: (hidden,), or (positions, hidden) with `tokens` pooling."""

    def embed(**batch: Tensor) -> dict[str, Tensor]:
        return {"embedding": model.embed(**batch)}

    return run_inference(model, embed, texts, collate, precision, description="embedding")["embedding"]


def encode_texts(model: BottleneckClassifier, texts: Dataset, collate: Collate, precision: str) -> list[Tensor]:
    """The codes of each text, uint16, under the frozen encoder and keys."""

    def encode(**batch: Tensor) -> dict[str, Tensor]:
        return {"codes": model.bottleneck.encode(model.embed(**batch)).to(torch.uint16)}

    return run_inference(model, encode, texts, collate, precision, description="encoding")["codes"]


@dataclass
class Filling:
    """How bottlenecks of one shape (the arguments of DiscreteKeyValueBottleneck) are filled in a run."""

    pipeline: Pipeline
    shape: dict[str, Any]
    value_epochs: float
    value_batch_size: int

    def fill(
        self,
        name: str,
        encoder: PreTrainedModel,
        texts: Texts,
        keys: Keys,
        source: BottleneckClassifier | None = None,
        logits: TeacherOutputs | None = None,
    ) -> BottleneckClassifier:
        """A bottleneck behind a frozen encoder: keys, then (but for `reused`) values on cached codes."""
        precision = self.pipeline.precision
        labels = dict(enumerate(texts.data.label_names)) or {0: "LABEL_0"}
        model = BottleneckClassifier.around(encoder, labels, self.pipeline.pooling, **self.shape).to(best_device())
        seed = self.pipeline.run.args.seed
        sample = (
            texts.train.shuffle(seed=seed).select(range(FIT_TEXTS)) if len(texts.train) > FIT_TEXTS else texts.train
        )
        embeddings = embed_texts(model, sample, texts.collate, precision)
        rows = torch.cat([e.view(-1, e.shape[-1]) for e in embeddings]).to(model.device)
        model.config.key_statistics = set_keys(
            model.bottleneck, keys, source.bottleneck if source else None, rows, seed
        )
        if keys == "reused":
            return model
        if embeddings[0].dim() == 1 and len(embeddings) == len(texts.train):  # one vector a text, none left out
            codes = list(model.bottleneck.encode(rows).to(torch.uint16).cpu())
        else:
            codes = encode_texts(model, texts.train, texts.collate, precision)
        rate = self.pipeline.run.args.value_learning_rate or self.pipeline.run.args.learning_rate
        validation_codes = encode_texts(model, texts.validation, texts.collate, precision)
        return self.pipeline.run.train(
            name,
            model,
            {
                "num_train_epochs": self.value_epochs,
                "learning_rate": rate / 10,  # of the decoder, which every text moves; a value waits for its key
                "value_learning_rate": rate,
                "per_device_train_batch_size": self.value_batch_size,
                "train_sampling_strategy": "random",
            },
            objective=self.pipeline.objective(texts.data, logits is not None),
            teacher_outputs=logits,
            train_dataset=code_dataset(codes, texts.train),
            eval_dataset=code_dataset(validation_codes, texts.validation),
            data_collator=identity_collate,
            compute_metrics=trainer_metrics(texts.data),
        )
