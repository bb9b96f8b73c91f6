"""What a text student is trained for: methods of all domains by name, and hidden states, embeddings and attention of
the teacher's layers. Each is a Method, and they add up.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kd.common.losses import attention_kl, feature_cosine, feature_l2
from kd.common.methods import (
    METHODS,
    Feature,
    Method,
    ModelFeatures,
    TaskSpec,
    depth_map,
    kd_flags,
    labels,
    labels_and_soft_targets,
    match,
    parse_method,
    some_of_each_class,
)
from kd.common.objective import FeatureLoss, FeatureTerm, Transform
from kd.common.outputs import FeatureHooks
from kd.common.training.arguments import KDTrainingArguments
from kd.common.training.inference import run_inference
from kd.common.utils.errors import UserError
from kd.nlp.data.loading import TextData, Texts
from kd.nlp.student_model.arguments import HiddenLoss, LayerMap
from kd.nlp.student_model.bottleneck_classifier import Pooling, pool
from kd.nlp.student_model.layers import layer_paths
from kd.nlp.teacher_model.teacher import encoder_of

PLAIN = "kd"
QUERIES, KEYS = ("query", "q_lin", "q_proj"), ("key", "k_lin", "k_proj")  # of BERT, DistilBERT, others


# ---- methods by name ----


def text_method(
    spec: str,
    training: KDTrainingArguments,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    texts: Texts,
    pooling: Pooling,
) -> Method:
    """The method NAME[:setting=value]... of a student and its teacher. Raises UserError as `check_method` does."""
    method: Method = parse_method(spec, METHODS, **kd_flags(spec, training))(
        TaskSpec(
            classes=texts.data.num_labels,
            student=student,
            teacher=teacher,
            features_of=text_features,
            pool=pooled_by(pooling),
            flatten=pooled_by(pooling),  # before pooling, features have another size in each batch
            labels=torch.tensor(texts.train["labels"]),
            teacher_samples=partial(teacher_samples, teacher, texts, pooling, training.precision),
        )
    )
    return method


def check_method(spec: str, training: KDTrainingArguments, dataset: str, classes: int) -> None:
    """Raises UserError for an unknown method, and for one that does not fit data of so many classes (1: numbers)."""
    if classes == 1 and spec != PLAIN:
        raise UserError(f"--method {spec} is for classes, and {dataset} has numbers: pass --method {PLAIN}")
    if training.label_smoothing_factor and spec != PLAIN:
        raise UserError(f"--method {spec} takes labels as they are: leave --label_smoothing_factor at 0")
    if classes > 1:
        parse_method(spec, METHODS, **kd_flags(spec, training))(_without_models(classes))


def check_smoothing(training: KDTrainingArguments, dataset: str, classes: int) -> None:
    """Raises UserError for smoothed labels of data that have numbers (1 class) instead."""
    if training.label_smoothing_factor and classes == 1:
        raise UserError(f"--label_smoothing_factor is for classes, and {dataset} has numbers: leave it at 0")


def needs_features(spec: str) -> bool:
    """Whether a method needs more of a teacher than its logits."""
    return bool(parse_method(spec, METHODS)(_without_models(classes=3)).teacher_features)


def _without_models(classes: int) -> TaskSpec:
    """To build a method with before there are models."""
    feature, labels = Feature("last", width=1), torch.arange(classes)
    return TaskSpec(
        classes=classes,
        student=None,
        teacher=None,
        features_of=lambda model: ModelFeatures([feature], head=feature, last=feature),
        pool=pooled_by("cls"),
        flatten=pooled_by("cls"),
        labels=labels,
        teacher_samples=lambda: (torch.zeros(classes, 1), labels),
    )


def text_features(model: PreTrainedModel) -> ModelFeatures:
    """The outputs of the layers, before the final norm of encoders that have one (ModernBERT, GPT-2)."""
    layers = [Feature(path, width(model)) for path in layer_paths(model)]
    return ModelFeatures(layers, head=layers[-1], last=layers[-1])


def teacher_samples(teacher: PreTrainedModel, texts: Texts, pooling: Pooling, precision: str) -> tuple[Tensor, Tensor]:
    """Pooled outputs (texts, width) of the last layer for some training texts of each class, and their labels."""
    labels = torch.tensor(texts.train["labels"])
    rows = some_of_each_class(labels, texts.data.num_labels)
    encoder = encoder_of(teacher)
    hooks = FeatureHooks(encoder, {"last": layer_paths(encoder)[-1]})

    def pooled(**batch: Any) -> dict[str, Tensor]:
        encoder(**batch)
        return {"pooled": pool(hooks.take()["last"].float(), batch["attention_mask"], pooling)}

    try:
        outputs = run_inference(encoder, pooled, texts.train.select(rows.tolist()), texts.collate, precision)
    finally:
        hooks.remove()
    return torch.stack(outputs["pooled"]), labels[rows]


# ---- layers ----


def layer_pairs(layer_map: LayerMap, student_layers: int, teacher_layers: int) -> list[tuple[int, int]]:
    """(student layer, teacher layer), from 0. `uniform`: the same relative depth. `skip` and `last` are those of PKD
    (arXiv:1908.09355): the uniform ones, or the teacher's last ones, without the last layer, which the head sees.
    Raises UserError where that leaves none, and where the student has more layers than the teacher.
    """
    if student_layers > teacher_layers:
        raise UserError(
            f"the student has {student_layers} layers to match, its teacher only {teacher_layers}: choose a student "
            "of no more, or match no layers (--align_epochs 0, weights of 0)"
        )
    pairs = depth_map(student_layers, teacher_layers, "last" if layer_map == "last" else "nearest")
    if layer_map != "uniform":
        pairs = pairs[:-1]
    if not pairs:
        raise UserError(f"--layer_map {layer_map} leaves out the last layer, the student's only one: choose uniform")
    return pairs


def hidden_states(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    weight: float,
    loss_name: HiddenLoss = "both",
    layer_map: LayerMap = "uniform",
    pooling: Pooling = "tokens",
) -> Method:
    """Hidden states of paired layers, averaged over the pairs; through linear regressors where the widths differ.

    With a `pooling` other than tokens also, where the widths are the same and the last layers a pair, the pooled
    states of these, which are the input of a bottleneck or a head.
    """
    loss = LOSSES[loss_name]
    layers, teacher_layers = text_features(student).stages, text_features(teacher).stages
    pairs = layer_pairs(layer_map, len(layers), len(teacher_layers))
    method = Method({})
    for i, j in pairs:
        regressor = regressor_of(student, teacher)
        method += match(f"hidden_{i}", weight / len(pairs), layers[i], teacher_layers[j], loss, regressor)
    if width(student) == width(teacher) and pooling != "tokens" and layer_map == "uniform":
        last, transform = (layers[-1], teacher_layers[-1]), pooled_by(pooling)
        method += match("hidden_pooled", weight, *last, loss, transform=transform)
    return method


def embeddings(student: PreTrainedModel, teacher: PreTrainedModel, weight: float, loss_name: HiddenLoss) -> Method:
    """The outputs of the embeddings, before the first layer."""
    features, teacher_features = (Feature(_embeddings(model), width(model)) for model in (student, teacher))
    regressor = regressor_of(student, teacher)
    return match("embeddings", weight, features, teacher_features, LOSSES[loss_name], regressor)


def attentions(student: PreTrainedModel, teacher: PreTrainedModel, weight: float, layer_map: LayerMap) -> Method:
    """Attention distributions of paired layers (arXiv:2002.10957), averaged over the pairs.

    Computed from queries and keys, so that either model may use fused attention, in as many heads as the teacher has,
    whatever the number of the student's.
    """
    heads = teacher.config.num_attention_heads
    if width(student) % heads:
        raise UserError(
            f"--attention_weight needs a student whose width ({width(student)}) is a multiple of the teacher's "
            f"{heads} heads"
        )
    layers, teacher_layers = layer_paths(student), layer_paths(teacher)
    pairs = layer_pairs(layer_map, len(layers), len(teacher_layers))
    method = Method({})
    for i, j in pairs:
        paths, teacher_paths = (
            [_first_named(model, names, layer) for names in (QUERIES, KEYS)]
            for model, layer in ((student, layers[i]), (teacher, teacher_layers[j]))
        )
        term = FeatureTerm(paths, teacher_paths, partial(attention_kl, heads=heads))
        method += Method(
            {f"attention_{i}": (weight / len(pairs), term)},
            {path: path for path in paths},
            {path: path for path in teacher_paths},
        )
    return method


def pooled_by(pooling: Pooling) -> Transform:
    """The transform of a FeatureTerm that pools hidden states (batch, positions, width) to (batch, width)."""

    def transform(states: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            raise ValueError("pooled hidden states need an attention mask")
        return pool(states.float(), mask, pooling)

    return transform


def regressor_of(student: PreTrainedModel, teacher: PreTrainedModel) -> nn.Linear | None:
    """Of FitNets (arXiv:1412.6550), where the widths differ."""
    same = width(student) == width(teacher)
    return None if same else nn.Linear(width(student), width(teacher))


def l2_and_cosine(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    return feature_l2(student, teacher, mask) + feature_cosine(student, teacher, mask)


LOSSES: dict[str, FeatureLoss] = {"l2": feature_l2, "cosine": feature_cosine, "both": l2_and_cosine}


def width(model: PreTrainedModel) -> int:
    return int(encoder_of(model).config.hidden_size)


def _embeddings(model: PreTrainedModel) -> str:
    """The path of the input of the first layer: an ELECTRA projects its embeddings to the width of its layers."""
    projected = [path for path, _ in model.named_modules() if path.split(".")[-1] == "embeddings_project"]
    return projected[0] if projected else _first_named(model, ("embeddings",))


def _first_named(model: PreTrainedModel, names: tuple[str, ...], below: str = "") -> str:
    """The path of the submodule with one of these names, under the path `below`."""
    for path, _ in model.named_modules():
        if path.startswith(f"{below}." if below else "") and path.split(".")[-1] in names:
            return path
    raise UserError(f"{type(model).__name__} has no part called {' or '.join(names)}: leave that weight at 0")


# ---- what a classifier is trained for ----


def labels_only(data: TextData, training: KDTrainingArguments) -> Method:
    return labels(1.0, data.regression, training.label_smoothing_factor)


def labels_and_logits(data: TextData, training: KDTrainingArguments) -> Method:
    """alpha * labels + (1 - alpha) * soft targets (Hinton 2015, arXiv:1503.02531)."""
    smoothing = training.label_smoothing_factor
    return labels_and_soft_targets(training.alpha, training.temperature, data.regression, smoothing)
