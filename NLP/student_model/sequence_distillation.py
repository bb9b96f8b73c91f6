"""Shared by the distillations of language models and of translators: the objective on tokens, training, results."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kd.common.losses import jensen_shannon, soft_target_kl
from kd.common.methods import Method
from kd.common.metrics.quality import language_warning, token_counts
from kd.common.objective import IGNORED, Divergence, logit_term, task_loss
from kd.common.pretrained import load_tokenizer, stage_loader
from kd.common.training.run import TrainerRun
from kd.common.utils.errors import UserError
from kd.nlp.teacher_model.generative import SCRATCH, Generator

CUT = "cut"
Splits = dict[str, Dataset]
read_tokenizer = stage_loader(AutoTokenizer, load_tokenizer)


def check_same_vocabulary(args: Any, student: Generator | None, teacher: Generator | None) -> None:
    """Raises UserError where a named student does not have the vocabulary of a named teacher."""
    if student and (teacher is None or not student.has_vocabulary_of(teacher)):
        raise UserError(
            f"student {args.student} and teacher {args.teacher} have different vocabularies: pass --student "
            f"{SCRATCH} or {CUT}, or a student with the teacher's tokenizer"
        )


def divergence_of(name: str, temperature: float, js_beta: float = 0.5) -> Divergence:
    """Between the distributions of student and teacher over the next token: forward or reverse KL, or generalised
    Jensen-Shannon.
    """
    if name == "js":
        return partial(jensen_shannon, temperature=temperature, beta=js_beta)
    return partial(soft_target_kl, temperature=temperature, direction=name)


def token_level(alpha: float, divergence: Divergence, smoothing: float = 0.0) -> Method:
    """alpha * (smoothed) labels + (1 - alpha) * the teacher's distributions over next tokens, both means over the
    tokens.
    """
    labels, teacher = task_loss(smoothing=smoothing), logit_term(divergence, ignore_unlabelled=True)
    return Method({"task": (alpha, labels), "tokens": (1 - alpha, teacher)})


def train_on_tokens(
    run: TrainerRun,
    name: str,
    model: PreTrainedModel,
    method: Method,
    train: Dataset,
    validation: Dataset,
    collate: Callable[[Any], dict[str, Any]],
    metrics: Callable[[np.ndarray], dict[str, float]],
    teacher: PreTrainedModel | None = None,
    **settings: Any,
) -> PreTrainedModel:
    """Trains a model that predicts next tokens. `metrics` takes `token_counts` (sequences, 3), because logits (batch,
    positions, vocabulary) are too large to gather; `settings` are training arguments of this stage.
    """
    return run.train(
        name,
        model,
        settings,
        objective=method.objective,
        features=method.features,
        teacher=teacher,
        teacher_features=method.teacher_features,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=collate,
        preprocess_logits_for_metrics=token_counts,
        compute_metrics=lambda prediction: metrics(np.asarray(prediction.predictions)),
    )


def label_tokens(rows: Dataset) -> np.ndarray:
    """The labels of all rows one after another, without those that are IGNORED."""
    labels = rows.select_columns(["labels"]).with_format("arrow")[:]["labels"].combine_chunks().flatten().to_numpy()
    return np.asarray(labels[labels != IGNORED])


def warn_of_guessing(run: TrainerRun, entry: dict[str, Any], splits: Splits, vocabulary: int) -> None:
    """Warns of a teacher (its entry in results.json) that is no better than the frequencies of the tokens."""
    perplexity = entry["metrics"]["validation"]["perplexity"]
    train, validation = (label_tokens(splits[split]) for split in ("train", "validation"))
    run.warn(language_warning(entry["name"], perplexity, train, validation, vocabulary))


def sequence_results(
    run: TrainerRun, task: str, data: Any, splits: Splits, models: dict[str, Any], **headline: Any
) -> dict[str, Any]:
    """The run's results.json; see `Run.results` for the `headline`. `data` has a fingerprint and notes."""
    sizes = {split: len(splits[split]) if split in splits else None for split in ("train", "validation", "test")}
    return run.results(
        domain="NLP",
        task=task,
        data={**sizes, "fingerprint": data.fingerprint},
        models=models,
        split="validation",
        selection=run.args.selection,
        data_notes="; ".join(data.notes) or "none",
        **headline,
    )


def learn_tokenizer(run: TrainerRun, build: Callable[[], PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
    """A stage, so that a run that is continued keeps its vocabulary."""
    return run.stage("tokenizer", build, read_tokenizer)
