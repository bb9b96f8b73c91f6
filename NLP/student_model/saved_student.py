"""A saved text student with a bottleneck, to which texts are added or which forgets them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import concatenate_datasets
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from kd.common.bottleneck.changes import bottleneck_of
from kd.common.bottleneck.module import DiscreteKeyValueBottleneck
from kd.common.bottleneck.training import CodeDataset, encode_samples
from kd.common.data.sources import labelled
from kd.common.pretrained import load_model, load_tokenizer, reading
from kd.common.reporting.saved_models import saved_model
from kd.common.training.inference import column_array
from kd.common.utils.devices import best_device
from kd.nlp.data.loading import TextData, Texts
from kd.nlp.student_model.bottleneck_training import samples_of


@dataclass(frozen=True)
class SavedStudent:
    """A student, its folder, tokenizer and bottleneck."""

    folder: str
    model: Any
    tokenizer: Any
    bottleneck: DiscreteKeyValueBottleneck

    @classmethod
    def load(cls, name: str) -> "SavedStudent":
        """Loads the student of a run, or a folder. Raises UserError if it has no bottleneck."""
        folder = saved_model(name)
        with reading(folder, "a text classifier"):
            model = load_model(AutoModelForSequenceClassification, folder).to(best_device()).eval()
            tokenizer = load_tokenizer(AutoTokenizer, folder)
        return cls(folder, model, tokenizer, bottleneck_of(model, folder))

    @property
    def label_names(self) -> list[str]:
        """Class names by class id."""
        return list(self.model.config.id2label.values())

    def codes_of(self, data: TextData) -> CodeDataset:
        """Codes and labels of the labelled texts of all splits. The labels are those of `data`."""
        texts = Texts.of(data, self.tokenizer)
        rows = concatenate_datasets(list(texts.splits.values()))
        rows = rows.select(np.flatnonzero(labelled(column_array(rows, "labels"))))
        samples = samples_of(texts, rows)
        codes = encode_samples(self.model, rows, texts.collate, "fp32")
        return CodeDataset(codes, samples.labels, samples.sample_ids)
