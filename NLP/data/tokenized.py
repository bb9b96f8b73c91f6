"""Texts as token ids, ready for the trainer."""

from datasets import Dataset
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from kd.nlp.data.loading import TextData


def tokenize(data: TextData, tokenizer: PreTrainedTokenizerBase) -> dict[str, Dataset]:
    """Every split with the tokenizer's columns, labels, sample_id and length (in tokens, for grouping).

    Longer texts are cut to the tokenizer's own `model_max_length`, which is saved with it.
    """

    def encode(rows: dict[str, list]) -> dict[str, list]:
        encoded = tokenizer(rows["text"], rows.get("text_pair"), truncation=True)
        return {
            **encoded,
            "labels": rows["label"],
            "sample_id": rows["sample_id"],
            "length": [len(ids) for ids in encoded["input_ids"]],
        }

    return {
        split: rows.map(encode, batched=True, remove_columns=rows.column_names, desc=f"tokenizing {split}")
        for split, rows in data.splits.items()
    }


class Collator(DataCollatorWithPadding):
    """Pads to the longest text of the batch; leaves out the column that only served to group."""

    def __call__(self, features: list[dict]) -> dict:
        return dict(super().__call__([{k: v for k, v in row.items() if k != "length"} for row in features]))
