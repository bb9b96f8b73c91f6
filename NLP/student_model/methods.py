"""Methods of distilling a text classifier, by name: those of every domain, as they see a student and its teacher."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, set_seed

from kd.common.features import FeatureHooks
from kd.common.methods import Method, TaskSpec, chosen, flags_of, some_of_each_class
from kd.common.methods.logits import LOGIT_METHODS
from kd.common.methods.relations import RELATION_METHODS
from kd.common.objective import soft_targets, task_loss
from kd.common.training.arguments import KDTrainingArguments
from kd.common.training.inference import run_inference
from kd.common.utils.errors import UserError
from kd.nlp.data.loading import TextData
from kd.nlp.data.tokenized import Texts
from kd.nlp.student_model.arguments import MatchingArguments
from kd.nlp.student_model.bottleneck_classifier import Pooling, pool
from kd.nlp.student_model.layers import layer_paths
from kd.nlp.student_model.matching import attentions, embeddings, hidden_states, match_pooled, width
from kd.nlp.teacher_model.teacher import encoder_of

METHODS: dict[str, Callable[..., Method]] = LOGIT_METHODS | RELATION_METHODS
PLAIN = "kd"


def looks_inside(spec: str) -> bool:
    """Whether a method needs more of a teacher than its logits."""
    return spec.split(":")[0] in RELATION_METHODS


def refuse_unfit(spec: str, training: KDTrainingArguments, dataset: str, classes: int) -> None:
    """Raises UserError for what is no method, and for one that data of so many classes (1: numbers) are not for."""
    if classes == 1 and spec != PLAIN:
        raise UserError(f"--method {spec} is for classes, and {dataset} has numbers: pass --method {PLAIN}")
    if training.label_smoothing_factor and spec != PLAIN:
        raise UserError(f"--method {spec} takes labels as they are: leave --label_smoothing_factor at 0")
    if classes > 1:
        anything = partial(match_pooled, "", "", "cls")
        method = chosen(spec, METHODS, **flags_of(spec, training))
        method(TaskSpec(classes, 1, 1, anything, anything, lambda: (torch.empty(0, 1), torch.empty(0))))


def refuse_smoothing(training: KDTrainingArguments, dataset: str, classes: int) -> None:
    """Raises UserError for smoothed labels of data that have numbers (1 class) instead."""
    if training.label_smoothing_factor and classes == 1:
        raise UserError(f"--label_smoothing_factor is for classes, and {dataset} has numbers: leave it at 0")


def method_terms(
    spec: str,
    training: KDTrainingArguments,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    texts: Texts,
    pooling: Pooling,
) -> Method:
    """The terms of the method NAME[:setting=value]..., and the features that they need. Errors as of refuse_unfit."""
    method = chosen(spec, METHODS, **flags_of(spec, training))
    own, target = (encoder_of(model).config.num_hidden_layers - 1 for model in (student, teacher))
    names = f"student_{own}", f"layer_{target}"
    task = task_of(names, student, teacher, texts, pooling, training.precision)
    if looks_inside(spec):
        paths = layer_paths(student)[-1], layer_paths(teacher)[-1]
        task = replace(task, features={names[0]: paths[0]}, teacher_features={names[1]: paths[1]})
    return method(task)


def task_of(
    names: tuple[str, str],
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    texts: Texts,
    pooling: Pooling,
    precision: str,
) -> TaskSpec:
    """What methods need to know; `names` are those of the last hidden states, which are the heads' features pooled."""
    pooled = partial(match_pooled, *names, pooling)
    return TaskSpec(
        classes=texts.data.num_labels,
        student_width=width(student),
        teacher_width=width(teacher),
        pooled=pooled,
        last=pooled,  # before they are pooled they are of another size for each batch
        teacher_samples=partial(teacher_features, teacher, texts, pooling, precision),
    )


def teacher_features(
    teacher: PreTrainedModel, texts: Texts, pooling: Pooling, precision: str
) -> tuple[Tensor, Tensor]:
    """Pooled outputs (texts, width) of the last layer for some training texts of each class, and their labels."""
    labels = torch.tensor(texts.train["labels"])
    rows = some_of_each_class(labels, texts.data.num_labels)
    encoder = encoder_of(teacher)
    hooks = FeatureHooks(encoder, {"last": layer_paths(encoder)[-1]})

    def pooled(**batch: Any) -> dict[str, Tensor]:
        encoder(**batch)
        return {"pooled": pool(hooks.take()["last"].float(), batch["attention_mask"], pooling)}

    try:
        found = run_inference(encoder, pooled, texts.train.select(rows.tolist()), texts.collate, precision)
    finally:
        hooks.remove()
    return torch.stack(found["pooled"]), labels[rows]


# ---- what a classifier is trained for ----


def labels_only(data: TextData, training: KDTrainingArguments) -> Method:
    return Method({"task": (1.0, task_loss(data.regression, training.label_smoothing_factor))})


def labels_and_logits(data: TextData, training: KDTrainingArguments) -> Method:
    """alpha * labels + (1 - alpha) * soft targets (Hinton 2015, arXiv:1503.02531)."""
    alpha, task = training.alpha, task_loss(data.regression, training.label_smoothing_factor)
    soft = soft_targets(training.temperature, data.regression)
    return Method({"task": (alpha, task), "soft_targets": (1 - alpha, soft)})


def classifier_method(
    matching: MatchingArguments,
    training: KDTrainingArguments,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    texts: Texts,
) -> Method:
    """What a plain student is trained for; the seed decides the initial weights of auxiliary modules."""
    set_seed(training.seed)
    if matching.method == PLAIN:
        method = labels_and_logits(texts.data, training)
    else:
        method = method_terms(matching.method, training, student, teacher, texts, "cls")
    if weight := matching.hidden_weight:
        method += hidden_states(student, teacher, weight, matching.hidden_loss, matching.layer_map, "cls")
    if weight := matching.embedding_weight:
        method += embeddings(student, teacher, weight, matching.hidden_loss)
    if weight := matching.attention_weight:
        method += attentions(student, teacher, weight, matching.layer_map)
    return method
