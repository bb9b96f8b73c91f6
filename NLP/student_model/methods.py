"""Methods for text students: those of all domains by name, and matching of hidden states, embeddings and attention.

Each function returns a Method; methods are joined with `+`.
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
    unlabelled_error,
)
from kd.common.objective import FeatureLoss, FeatureTerm
from kd.common.outputs import FeatureHooks
from kd.common.training.arguments import KDTrainingArguments
from kd.common.training.inference import column_array, run_inference
from kd.common.utils.errors import UserError
from kd.nlp.data.loading import TextData, Texts
from kd.nlp.student_model.arguments import HiddenLoss, LayerMap
from kd.nlp.student_model.layers import last_layer, layer_paths
from kd.nlp.student_model.pooling import Pooling, head_pooling, pool
from kd.nlp.teacher_model.teacher import encoder_of

PLAIN = "kd"
QUERIES, KEYS = ("query", "q_lin", "q_proj"), ("key", "k_lin", "k_proj")  # names in BERT, DistilBERT and others


# ---- methods by name ----


def text_method(
    spec: str,
    training: KDTrainingArguments,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    texts: Texts,
) -> Method:
    """The method NAME[:key=value]... of a student and its teacher. Raises UserError as `check_method` does."""
    pooling, teacher_pooling = (head_pooling(model, texts.data.task) for model in (student, teacher))
    method: Method = parse_method(spec, METHODS, **kd_flags(spec, training))(
        TaskSpec(
            classes=texts.data.num_labels,
            student=student,
            teacher=teacher,
            features_of=text_features,
            pool=partial(pool, pooling=pooling),
            flatten=partial(pool, pooling=pooling),  # before pooling, the size of features differs between batches
            labels=torch.from_numpy(column_array(texts.train, "labels")),
            teacher_samples=partial(teacher_samples, teacher, texts, teacher_pooling, training.precision),
        )
    )
    return method


def check_method(spec: str, training: KDTrainingArguments, dataset: str, classes: int) -> None:
    """Raises UserError for an unknown method, and for one that does not support this number of classes (1 for
    regression).
    """
    if classes == 1 and spec != PLAIN:
        raise UserError(
            f"--method {spec} is for classification, and the labels of {dataset} are numbers: pass --method {PLAIN}"
        )
    if training.label_smoothing_factor and spec != PLAIN:
        raise UserError(f"--method {spec} does not support label smoothing: leave --label_smoothing_factor at 0")
    if classes > 1:
        parse_method(spec, METHODS, **kd_flags(spec, training))(_without_models(classes))


def check_smoothing(training: KDTrainingArguments, dataset: str, classes: int) -> None:
    """Raises UserError for label smoothing of regression data (1 class)."""
    if training.label_smoothing_factor and classes == 1:
        raise UserError(
            f"--label_smoothing_factor is for classification, and the labels of {dataset} are numbers: leave it at 0"
        )


def needs_features(spec: str) -> bool:
    """Whether a method needs features of the teacher in addition to its logits."""
    return bool(parse_method(spec, METHODS)(_without_models(classes=3)).teacher_features)


def check_needs_no_labels(spec: str) -> None:
    """Raises UserError for a method that needs the label of every row."""
    method = parse_method(spec, METHODS)(_without_models(classes=3))
    if method.label_terms:
        raise UserError(unlabelled_error(f"--method {spec}", method.label_terms))


def _without_models(classes: int) -> TaskSpec:
    """A TaskSpec to check a method with before models are loaded."""
    feature, labels = Feature("last", width=1), torch.arange(classes)
    return TaskSpec(
        classes=classes,
        student=None,
        teacher=None,
        features_of=lambda model: ModelFeatures([feature], head=feature, last=feature),
        pool=partial(pool, pooling="cls"),
        flatten=partial(pool, pooling="cls"),
        labels=labels,
        teacher_samples=lambda: (torch.zeros(classes, 1), labels),
    )


def text_features(model: PreTrainedModel) -> ModelFeatures:
    """The output of the last layer, before a final norm if there is one (ModernBERT, GPT-2)."""
    last = Feature(last_layer(model), width(model))
    return ModelFeatures([last], head=last, last=last)


def teacher_samples(teacher: PreTrainedModel, texts: Texts, pooling: Pooling, precision: str) -> tuple[Tensor, Tensor]:
    """Pooled outputs (texts, width) of the last layer for up to PER_CLASS training texts of each class, and their
    labels.
    """
    labels = torch.from_numpy(column_array(texts.train, "labels"))
    rows = some_of_each_class(labels, texts.data.num_labels)
    encoder = encoder_of(teacher)
    hooks = FeatureHooks(encoder, {"last": last_layer(encoder)})

    def pooled(**batch: Any) -> dict[str, Tensor]:
        encoder(**batch)
        return {"pooled": pool(hooks.take()["last"], batch["attention_mask"], pooling)}

    try:
        outputs = run_inference(encoder, pooled, texts.train.select(rows.tolist()), texts.collate, precision)
    finally:
        hooks.remove()
    return torch.stack(outputs["pooled"]), labels[rows]


# ---- layers ----


def layer_pairs(layer_map: LayerMap, student_layers: int, teacher_layers: int) -> list[tuple[int, int]]:
    """Matched layers (student layer, teacher layer), counted from 0. `uniform`: at the same relative depth. `skip` and
    `last` are PKD's (arXiv:1908.09355): the uniform layers or the teacher's last ones, in both cases without the last
    layer, the input of the head. Raises UserError if no layer remains, or if the student has more layers than the
    teacher.
    """
    if student_layers > teacher_layers:
        raise UserError(
            f"the student has {student_layers} layers to match, its teacher only {teacher_layers}: choose a smaller "
            "student, or match no layers (--align_epochs 0, and 0 for the weights of hidden states and attention)"
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
    """Hidden states of matched layers, averaged over the layers, through linear regressors if the widths differ.

    With a `pooling` of the student other than tokens, equal widths and a uniform layer map, the pooled states of the
    last layers are matched too: they are the input of a bottleneck or a head.
    """
    loss = LOSSES[loss_name]
    layers, teacher_layers = layer_outputs(student), layer_outputs(teacher)
    pairs = layer_pairs(layer_map, len(layers), len(teacher_layers))
    method = Method({})
    for i, j in pairs:
        regressor = regressor_of(student, teacher)
        method += match(f"hidden_{i}", weight / len(pairs), layers[i], teacher_layers[j], loss, regressor)
    if width(student) == width(teacher) and pooling != "tokens" and layer_map == "uniform":
        transform = partial(pool, pooling=pooling)
        method += match("hidden_pooled", weight, layers[-1], teacher_layers[-1], loss, transform=transform)
    return method


def layer_outputs(model: PreTrainedModel) -> list[Feature]:
    return [Feature(path, width(model)) for path in layer_paths(model)]


def embeddings(student: PreTrainedModel, teacher: PreTrainedModel, weight: float, loss_name: HiddenLoss) -> Method:
    """Outputs of the embeddings, before the first layer."""
    features, teacher_features = (Feature(_embeddings(model), width(model)) for model in (student, teacher))
    regressor = regressor_of(student, teacher)
    return match("embeddings", weight, features, teacher_features, LOSSES[loss_name], regressor)


def attentions(student: PreTrainedModel, teacher: PreTrainedModel, weight: float, layer_map: LayerMap) -> Method:
    """Attention distributions of matched layers (MiniLM, arXiv:2002.10957), averaged over the layers.

    They are computed from queries and keys, so that both models may use fused attention, and with the teacher's number
    of heads for both.
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
            _queries_and_keys(model, layer) for model, layer in ((student, layers[i]), (teacher, teacher_layers[j]))
        )
        term = FeatureTerm(paths, teacher_paths, partial(attention_kl, heads=heads))
        method += Method(
            {f"attention_{i}": (weight / len(pairs), term)},
            {path: path for path in paths},
            {path: path for path in teacher_paths},
        )
    return method


def regressor_of(student: PreTrainedModel, teacher: PreTrainedModel) -> nn.Linear | None:
    """A linear regressor as in FitNets (arXiv:1412.6550) if the widths differ, else None."""
    widths = width(student), width(teacher)
    return None if widths[0] == widths[1] else nn.Linear(*widths)


def l2_and_cosine(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    return feature_l2(student, teacher, mask) + feature_cosine(student, teacher, mask)


LOSSES: dict[str, FeatureLoss] = {"l2": feature_l2, "cosine": feature_cosine, "both": l2_and_cosine}


def width(model: PreTrainedModel) -> int:
    return int(encoder_of(model).config.hidden_size)


def check_submodules(model: PreTrainedModel, embedding_weight: float, attention_weight: float) -> None:
    """Raises UserError if a model lacks the submodules that these weights match."""
    if embedding_weight:
        _embeddings(model)
    if attention_weight:
        _queries_and_keys(model, layer_paths(model)[-1])


def _queries_and_keys(model: PreTrainedModel, layer: str) -> list[str]:
    return [_first_named(model, names, "--attention_weight", layer) for names in (QUERIES, KEYS)]


def _embeddings(model: PreTrainedModel) -> str:
    """The path of the submodule whose output enters the first layer. ELECTRA projects its embeddings to its width."""
    projected = [path for path, _ in model.named_modules() if path.split(".")[-1] == "embeddings_project"]
    return projected[0] if projected else _first_named(model, ("embeddings",), "--embedding_weight")


def _first_named(model: PreTrainedModel, names: tuple[str, ...], flag: str, below: str = "") -> str:
    """The path of the first submodule with one of these names, under the path `below`."""
    for path, _ in model.named_modules():
        if path.startswith(f"{below}." if below else "") and path.split(".")[-1] in names:
            return path
    raise UserError(f"{type(model).__name__} has no submodule {' or '.join(names)}: leave {flag} at 0")


# ---- labels and logits ----


def labels_only(data: TextData, training: KDTrainingArguments) -> Method:
    return labels(1.0, data.task, training.label_smoothing_factor)


def labels_and_logits(data: TextData, training: KDTrainingArguments) -> Method:
    """alpha * labels + (1 - alpha) * soft targets (Hinton 2015, arXiv:1503.02531)."""
    smoothing = training.label_smoothing_factor
    return labels_and_soft_targets(training.alpha, training.temperature, data.task, smoothing)
