"""What a translator is worth: BLEU and chrF by greedy and beam search, teacher-forced metrics, cost, seconds."""

import time
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from kd.common.metrics.cost import cost
from kd.common.metrics.generation import translation_metrics
from kd.common.metrics.language import token_counts, token_metrics
from kd.common.training.inference import NOT_INPUTS, run_inference
from kd.nlp.data.translation import PairCollator, TranslationData
from kd.nlp.teacher_model.seq2seq import Translator, translate

TIMED = 20  # sentences that are translated one by one to see how long that takes


def evaluate(
    name: str, translator: Translator, data: TranslationData, splits: dict[str, Dataset], beams: int
) -> tuple[dict[str, Any], dict[str, float], dict[str, str]]:
    """A model's entry in results.json, the seconds that 100 sentences take one by one, and sacreBLEU's signatures. All
    in fp32: what a user gets who just loads the model.
    """
    model, tokenizer = translator
    metrics: dict[str, dict[str, float]] = {}
    signatures: dict[str, str] = {}
    for split in (split for split in splits if split != "train"):
        metrics[split] = teacher_forced_metrics(translator, splits[split])
        for suffix, number in (("", 1), ("_beam", beams)):
            ids = translate(translator, splits[split], number, description="evaluating")
            texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
            scores, signatures = translation_metrics(texts, data.splits[split]["target"][:])
            metrics[split] |= {metric + suffix: score for metric, score in scores.items()}
    seconds = {f"seconds_per_100_{way}": seconds_per_100(translator, splits["validation"], number)
               for way, number in (("greedy", 1), ("beam", beams))}  # fmt: skip
    one = one_pair(translator, splits["validation"])
    return {"name": name, **cost(model, one), "metrics": metrics}, seconds, signatures


def teacher_forced_metrics(translator: Translator, rows: Dataset) -> dict[str, float]:
    """token_accuracy and perplexity of the reference's tokens, each given those before it."""
    model, collate = translator.model, PairCollator(translator.tokenizer, translator.model)

    def with_targets(features: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = collate(features)
        return batch | {"targets": batch["labels"]}  # labels themselves are kept from models

    def call(targets: Tensor, **batch: Tensor) -> dict[str, Tensor]:
        return {"counts": token_counts(model(**batch).logits, targets)}

    counts = run_inference(model, call, rows, with_targets, description="evaluating")["counts"]
    return token_metrics(torch.stack(counts).numpy())


def seconds_per_100(translator: Translator, rows: Dataset, beams: int) -> float:
    """What a user waits for 100 sentences that come one at a time, from a few of the rows."""
    few = rows.select(range(0, len(rows), -(-len(rows) // TIMED)))
    started = time.perf_counter()
    translate(translator, few, beams, batch_size=1)
    return 100 * (time.perf_counter() - started) / len(few)


def one_pair(translator: Translator, rows: Dataset) -> dict[str, Tensor]:
    """A pair of median length: what latency and FLOPs of one forward pass are measured on."""
    middle = int(np.argsort(rows["length"], kind="stable")[len(rows) // 2])
    batch = PairCollator(translator.tokenizer, translator.model)([rows[middle]])
    return {name: value.to(translator.model.device) for name, value in batch.items() if name not in NOT_INPUTS}
