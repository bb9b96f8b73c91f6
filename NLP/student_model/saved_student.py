"""A saved text student with a bottleneck, to which texts are added or which forgets them."""

import numpy as np
from datasets import concatenate_datasets
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from kd.common.bottleneck.changes import SavedStudent
from kd.common.bottleneck.training import CodeDataset, encode_samples
from kd.common.data.sources import labelled
from kd.common.pretrained import load_model, load_tokenizer, reading
from kd.common.reporting.saved_models import saved_model
from kd.common.training.inference import column_array
from kd.common.utils.devices import best_device
from kd.nlp.data.loading import TextData, Texts
from kd.nlp.student_model.bottleneck_training import samples_of


class SavedTextStudent(SavedStudent):
    """A student of texts."""

    @classmethod
    def load(cls, name: str) -> "SavedTextStudent":
        """Loads the student of a run, or a folder. Raises UserError if it has no bottleneck."""
        folder = saved_model(name)
        with reading(folder, "a text classifier"):
            model = load_model(AutoModelForSequenceClassification, folder).to(best_device()).eval()
            return cls(folder, model, load_tokenizer(AutoTokenizer, folder))

    def codes_of(self, data: TextData) -> CodeDataset:
        """Codes and labels of the labelled texts of all splits. The labels are those of `data`."""
        texts = Texts.of(data, self.processor)
        rows = concatenate_datasets(list(texts.splits.values()))
        rows = rows.select(np.flatnonzero(labelled(column_array(rows, "labels"))))
        samples = samples_of(texts, rows)
        codes = encode_samples(self.model, rows, texts.collate, "fp32")
        return CodeDataset(codes, samples.labels, samples.sample_ids)
