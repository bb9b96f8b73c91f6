"""Evaluation of sentence encoders: the correlation of cosine similarities with the scores of pairs of texts."""

from argparse import Namespace
from typing import Any

import numpy as np
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from kd.common.data.sources import print_notes
from kd.common.metrics.cost import cost
from kd.common.metrics.verdict import Measurement, measure_regression
from kd.common.training.inference import NOT_INPUTS, column_array
from kd.nlp.data.loading import TextData
from kd.nlp.data.sentences import load_pairs, tokenize
from kd.nlp.student_model.sentence_encoder import SentenceEncoder, load_sentence_encoder
from kd.nlp.teacher_model.teacher import architecture_of

METRIC = "spearman"
Similarities = dict[str, np.ndarray]  # (pairs,) by split
Evaluation = tuple[dict[str, Any], Similarities]  # an entry of results.json, and the similarities


def evaluate(name: str, encoder: SentenceEncoder, pairs: TextData, teacher: Evaluation | None = None) -> Evaluation:
    """A model's entry in results.json, with the agreement with the `teacher`, and its similarities."""
    found = similarities(encoder, pairs)
    others = None if teacher is None else teacher[1]
    return {"name": name, **cost_of(encoder, pairs), "metrics": pair_metrics(pairs, found, others)}, found


def similarities(encoder: SentenceEncoder, pairs: TextData) -> Similarities:
    """The cosine similarities (pairs,) of the embeddings of the two texts, by split."""
    found = {}
    for split, rows in pairs.splits.items():
        texts = [*rows["text"][:], *rows["text_pair"][:]]
        first, second = np.split(encoder.embed(tokenize(texts, encoder.tokenizer)), 2)
        found[split] = np.sum(first * second, axis=1)
    return found


def pair_metrics(
    pairs: TextData, found: Similarities, others: Similarities | None = None
) -> dict[str, dict[str, float]]:
    """Spearman and Pearson correlation with the scores and, by rank, the agreement with `others`, by split."""
    metrics = {}
    for split, values in found.items():
        labels = column_array(pairs.splits[split], "label")
        metrics[split] = {name: _correlation(values, labels, name) for name in (METRIC, "pearson")}
        if others is not None:
            metrics[split]["agreement"] = _correlation(values, others[split], METRIC)
    return metrics


def _correlation(values: np.ndarray, others: np.ndarray, name: str) -> float:
    return measure_regression(values, others, name).score(np.arange(len(values)))


def measure(pairs: TextData, found: Similarities) -> Measurement:
    """The measurement of the primary metric on validation."""
    split = validation_split(pairs)
    return measure_regression(found[split], column_array(pairs.splits[split], "label"), METRIC)


def validation_split(pairs: TextData) -> str:
    return next(name for name in pairs.splits if name.startswith("validation"))


def cost_of(encoder: SentenceEncoder, pairs: TextData) -> dict[str, Any]:
    """The cost of a text of median length, of the last split."""
    rows = tokenize([*pairs.splits.values()][-1]["text"][:], encoder.tokenizer)
    middle = int(np.argsort(column_array(rows, "length"), kind="stable")[len(rows) // 2])
    batch = encoder.collate([rows[middle]]).items()
    return cost(
        encoder.model, {name: value.to(encoder.model.device) for name, value in batch if name not in NOT_INPUTS}
    )


# ---- evaluation of a saved encoder ----


def is_sentence_encoder(config: Any) -> bool:
    """Whether a model has no head, such as BertModel, unlike GPT2LMHeadModel and MarianMTModel."""
    return architecture_of(config) in MODEL_MAPPING_NAMES.values()


def evaluate_pairs(name: str, args: Namespace) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The entry of the encoder NAME for the pairs that the flags name, and the columns of `write_predictions`."""
    encoder = load_sentence_encoder(name)
    pairs = load_pairs(args.dataset, args.text_columns, args.label_column, args.max_eval_samples, False)
    print_notes(pairs.name, pairs.notes)
    print_notes(name, encoder.notes)
    entry, found = evaluate(name, encoder, pairs)
    columns = {
        split: {"row": pairs.splits[split]["row"][:], "label": pairs.splits[split]["label"][:], "similarity": values}
        for split, values in found.items()
    }
    return entry, columns
