"""What a language model is worth: perplexity, bits per byte, agreement with its teacher, cost, and a sample."""

from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kd.common.metrics.cost import cost
from kd.common.metrics.language import language_metrics, token_agreement, token_counts
from kd.common.training.inference import run_inference
from kd.nlp.data.corpora import Corpus, stack

PROMPT, CONTINUATION = 12, 30  # tokens of the sample in the report


def evaluate(
    name: str,
    model: PreTrainedModel,
    corpus: Corpus,
    blocks: dict[str, Dataset],
    batch_size: int,
    teacher_choices: dict[str, np.ndarray] | None,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A model's entry in results.json, and its most probable next tokens by split (blocks, positions)."""
    metrics, choices = {}, {}
    for split in (split for split in blocks if split != "train"):
        counts, choices[split] = predict(model, blocks[split], batch_size)
        metrics[split] = language_metrics(counts, corpus.size(split))
        if teacher_choices is not None:
            metrics[split]["agreement"] = token_agreement(
                choices[split], teacher_choices[split], labels_of(blocks[split])
            )
    block = {"input_ids": blocks["validation"][:1]["input_ids"].to(model.device)}
    return {"name": name, **cost(model, block), "metrics": metrics}, choices


def predict(model: PreTrainedModel, blocks: Dataset, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """`token_counts` (blocks, 3) and the most probable next tokens (blocks, positions). Always fp32: what a user gets
    who just loads the model.
    """

    def call(input_ids: Tensor, targets: Tensor) -> dict[str, Tensor]:
        logits = model(input_ids).logits
        return {"counts": token_counts(logits, targets), "choices": logits.argmax(-1)}

    targets = blocks.rename_column("labels", "targets")  # labels themselves are kept from models
    said = run_inference(model, call, targets, stack, batch_size=batch_size, description="evaluating")
    return torch.stack(said["counts"]).numpy(), torch.stack(said["choices"]).numpy()


def labels_of(blocks: Dataset) -> np.ndarray:
    """(blocks, positions)"""
    return np.asarray(blocks.with_format("numpy")[:]["labels"])


# ---- a sample of what it writes ----


def first_words(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, block_size: int) -> str:
    """Those of a document, or line, that no model was trained on."""
    documents = corpus.splits.get("test", corpus.splits["validation"])
    document = next((text for text in documents if len(text.split()) >= PROMPT), documents[0])
    ids = tokenizer(document, add_special_tokens=False, truncation=True, max_length=min(PROMPT, block_size // 2))
    return str(tokenizer.decode(ids["input_ids"])).rsplit(maxsplit=1)[0]  # the last word may be cut


def continuation_length(block_size: int) -> int:
    """Tokens that a model is asked to write after the prompt, which it must still see."""
    return min(CONTINUATION, block_size // 2)


def continuation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, new: int) -> str:
    """What a model writes after the prompt, greedily, in one line."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    end = tokenizer.eos_token_id
    ids = model.eval().generate(**inputs, max_new_tokens=new, do_sample=False, pad_token_id=end)
    return one_line(str(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :])))


def one_line(text: str) -> str:
    return " ".join(text.split())
