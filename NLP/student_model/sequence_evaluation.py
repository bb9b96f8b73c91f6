"""Evaluation of language models (perplexity, bits per byte, a sample) and of translators (BLEU, chrF, seconds)."""

import time
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kd.common.metrics.cost import cost
from kd.common.metrics.quality import (
    language_metrics,
    token_agreement,
    token_counts,
    token_metrics,
    translation_metrics,
)
from kd.common.training.inference import NOT_INPUTS, run_inference
from kd.nlp.data.corpora import Corpus, stack
from kd.nlp.data.translation import TranslationCollator, TranslationData
from kd.nlp.teacher_model.generative import Generator, translate

Choices = dict[str, np.ndarray]  # the most probable next tokens (blocks, positions), by split
Translated = tuple[dict[str, Any], dict[str, float], dict[str, str]]  # returned by `evaluate_translator`
PROMPT, CONTINUATION = 12, 30  # tokens of the sample of a language model
TIMED = 20  # sentences that are translated one by one to measure how long that takes


# ---- language models ----


def evaluate_language_model(
    name: str,
    model: PreTrainedModel,
    corpus: Corpus,
    blocks: dict[str, Dataset],
    batch_size: int,
    teacher_choices: Choices | None = None,
) -> tuple[dict[str, Any], Choices]:
    """A model's entry in results.json on every split but train, and its most probable next tokens. With those of the
    teacher, also how often both choose the same.
    """
    metrics, choices = {}, {}
    for split in (split for split in blocks if split != "train"):
        counts, choices[split] = predict_tokens(model, blocks[split], batch_size)
        metrics[split] = language_metrics(counts, corpus.size(split))
        if teacher_choices is not None:
            labels = np.asarray(blocks[split].with_format("numpy")[:]["labels"])
            metrics[split]["agreement"] = token_agreement(choices[split], teacher_choices[split], labels)
    block = {"input_ids": blocks["validation"][:1]["input_ids"].to(model.device)}
    return {"name": name, **cost(model, block), "metrics": metrics}, choices


def predict_tokens(model: PreTrainedModel, blocks: Dataset, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """`token_counts` (blocks, 3) and the most probable next tokens (blocks, positions). Always fp32, as for a user who
    just loads the model.
    """

    def call(input_ids: Tensor, targets: Tensor) -> dict[str, Tensor]:
        logits = model(input_ids).logits
        return {"counts": token_counts(logits, targets), "choices": logits.argmax(-1)}

    targets = blocks.rename_column("labels", "targets")  # labels are not passed to models
    outputs = run_inference(model, call, targets, stack, batch_size=batch_size, description="evaluating")
    return torch.stack(outputs["counts"]).numpy(), torch.stack(outputs["choices"]).numpy()


def first_words(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, block_size: int) -> str:
    """Those of a document, or line, that no model was trained on."""
    documents = corpus.splits.get("test", corpus.splits["validation"])
    document = next((text for text in documents if len(text.split()) >= PROMPT), documents[0])
    ids = tokenizer(document, add_special_tokens=False, truncation=True, max_length=min(PROMPT, block_size // 2))
    return str(tokenizer.decode(ids["input_ids"])).rsplit(maxsplit=1)[0]  # the last word may be cut


def continuation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, new: int) -> str:
    """What a model generates after the prompt, greedily, in one line."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    end = tokenizer.eos_token_id
    ids = model.eval().generate(**inputs, max_new_tokens=new, do_sample=False, pad_token_id=end)
    return one_line(str(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :])))


def one_line(text: str) -> str:
    return " ".join(text.split())


# ---- translators ----


def evaluate_translator(
    name: str, translator: Generator, data: TranslationData, splits: dict[str, Dataset], beams: int
) -> Translated:
    """A model's entry in results.json, the seconds for 100 sentences one by one, and sacreBLEU's signatures. BLEU and
    chrF are those of greedy and beam search. All in fp32, as for a user who just loads the model.
    """
    metrics: dict[str, dict[str, float]] = {}
    signatures: dict[str, str] = {}
    for split in (split for split in splits if split != "train"):
        metrics[split] = teacher_forced_metrics(translator, splits[split])
        for suffix, number in (("", 1), ("_beam", beams)):
            ids = translate(translator, splits[split], number, description="evaluating")
            texts = translator.tokenizer.batch_decode(ids, skip_special_tokens=True)
            scores, signatures = translation_metrics(texts, data.splits[split]["target"][:])
            metrics[split] |= {metric + suffix: score for metric, score in scores.items()}
    seconds = {f"seconds_per_100_{decoding}": seconds_per_100(translator, splits["validation"], number)
               for decoding, number in (("greedy", 1), ("beam", beams))}  # fmt: skip
    pair = median_pair(translator, splits["validation"])
    return {"name": name, **cost(translator.model, pair), "metrics": metrics}, seconds, signatures


def teacher_forced_metrics(translator: Generator, rows: Dataset) -> dict[str, float]:
    """token_accuracy and perplexity of the reference's tokens, each predicted from those before it."""
    model, collate = translator.model, TranslationCollator(translator.tokenizer, translator.model)

    def with_targets(features: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = collate(features)
        return batch | {"targets": batch["labels"]}  # labels are not passed to models

    def call(targets: Tensor, **batch: Tensor) -> dict[str, Tensor]:
        return {"counts": token_counts(model(**batch).logits, targets)}

    counts = run_inference(model, call, rows, with_targets, description="evaluating")["counts"]
    return token_metrics(torch.stack(counts).numpy())


def seconds_per_100(translator: Generator, rows: Dataset, beams: int) -> float:
    """The time that 100 sentences take one at a time, measured on a few of the rows."""
    few = rows.select(range(0, len(rows), -(-len(rows) // TIMED)))
    started = time.perf_counter()
    translate(translator, few, beams, batch_size=1)
    return 100 * (time.perf_counter() - started) / len(few)


def median_pair(translator: Generator, rows: Dataset) -> dict[str, Tensor]:
    """A pair of median length, on which latency and FLOPs of one forward pass are measured."""
    middle = int(np.argsort(rows["length"], kind="stable")[len(rows) // 2])
    batch = TranslationCollator(translator.tokenizer, translator.model)([rows[middle]])
    return {name: value.to(translator.model.device) for name, value in batch.items() if name not in NOT_INPUTS}
