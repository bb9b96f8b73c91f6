"""What of a student's inside is to be like the teacher's: which layers, by which loss."""

from typing import Literal

import torch
from transformers import PreTrainedModel

from kd.common.losses import attention_kl, feature_cosine, feature_l2
from kd.common.methods import Method
from kd.common.objective import FeatureLoss, Hint, Term, match
from kd.common.outputs import Outputs
from kd.common.utils.errors import UserError
from kd.nlp.student_model.bottleneck_classifier import Pooling, pool
from kd.nlp.student_model.layers import layer_paths, uniform_map
from kd.nlp.teacher_model.teacher import encoder_of

LayerMap = Literal["uniform", "last", "skip"]
HiddenLoss = Literal["l2", "cosine", "both"]
EMBEDDINGS = -1  # the number of the "layer" before the first
QUERIES, KEYS = ("query", "q_lin", "q_proj"), ("key", "k_lin", "k_proj")  # of BERT, DistilBERT, others


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
    uniform = list(enumerate(uniform_map(student_layers, teacher_layers)))
    last = [(i, teacher_layers - student_layers + i) for i in range(student_layers)]
    pairs = {"uniform": uniform, "skip": uniform[:-1], "last": last[:-1]}[layer_map]
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
    """Hidden states of paired layers, averaged over the pairs; through linear regressors where the widths differ. They
    are what the layers return, before the final norm of encoders that have one (ModernBERT, GPT-2).

    With a `pooling` other than tokens also, where the widths are the same and the last layers a pair, what is pooled
    from these, which is what a bottleneck or a head sees.
    """
    loss, same = LOSSES[loss_name], width(student) == width(teacher)
    own, target = layer_paths(student), layer_paths(teacher)
    pairs = layer_pairs(layer_map, len(own), len(target))
    found = Method({})
    for i, j in pairs:
        names = f"student_{i}", f"layer_{j}"
        found.terms[f"hidden_{i}"] = (weight / len(pairs), _match(*names, loss, student, teacher))
        found.features[names[0]], found.teacher_features[names[1]] = own[i], target[j]
    if same and pooling != "tokens" and layer_map == "uniform":
        found.terms["hidden_pooled"] = (weight, match_pooled(*names, pooling, loss))
    return found


def embeddings(student: PreTrainedModel, teacher: PreTrainedModel, weight: float, loss_name: HiddenLoss) -> Method:
    """What comes out of the embeddings, before the first layer."""
    names = "student_embeddings", f"layer_{EMBEDDINGS}"
    return Method(
        {"embeddings": (weight, _match(*names, LOSSES[loss_name], student, teacher))},
        {names[0]: _embeddings(student)},
        {names[1]: _embeddings(teacher)},
    )


def attentions(student: PreTrainedModel, teacher: PreTrainedModel, weight: float, layer_map: LayerMap) -> Method:
    """Attention distributions of paired layers (arXiv:2002.10957), averaged over the pairs.

    Computed from queries and keys, so that either model may use fused attention, in as many heads as the teacher has,
    whatever the number of the student's.
    """
    own, target = layer_paths(student), layer_paths(teacher)
    heads = teacher.config.num_attention_heads
    if width(student) % heads:
        raise UserError(
            f"--attention_weight needs a student whose width ({width(student)}) is a multiple of the teacher's "
            f"{heads} heads"
        )
    pairs = layer_pairs(layer_map, len(own), len(target))
    found = Method({})
    for i, j in pairs:
        found.terms[f"attention_{i}"] = (weight / len(pairs), match_attention(i, j, heads))
        for names, model, path, features in (
            (f"student_{i}", student, own[i], found.features),
            (f"layer_{j}", teacher, target[j], found.teacher_features),
        ):
            features[f"{names}_query"] = _first_named(model, QUERIES, path)
            features[f"{names}_key"] = _first_named(model, KEYS, path)
    return found


def match_attention(layer: int, teacher_layer: int, heads: int) -> Term:
    """KL between the attention distributions of two layers."""

    def term(student: Outputs, teacher: Outputs | None, labels: torch.Tensor | None) -> torch.Tensor:
        if teacher is None or not student.features or not teacher.features:
            raise ValueError("attention distributions need queries and keys of student and teacher")
        query, key = (student.features[f"student_{layer}_{part}"] for part in ("query", "key"))
        target_query, target_key = (teacher.features[f"layer_{teacher_layer}_{part}"] for part in ("query", "key"))
        return attention_kl(query, key, target_query, target_key, heads, student.mask)

    return term


def match_pooled(name: str, teacher_name: str, pooling: Pooling, loss: FeatureLoss) -> Term:
    """A feature loss between pooled hidden states."""

    def term(student: Outputs, teacher: Outputs | None, labels: torch.Tensor | None) -> torch.Tensor:
        if teacher is None or not student.features or not teacher.features or student.mask is None:
            raise ValueError("pooled hidden states need features of student and teacher, and an attention mask")
        own, target = student.features[name].float(), teacher.features[teacher_name].float()
        return loss(pool(own, student.mask, pooling), pool(target, student.mask, pooling))

    return term


def l2_and_cosine(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    return feature_l2(student, teacher, mask) + feature_cosine(student, teacher, mask)


LOSSES: dict[str, FeatureLoss] = {"l2": feature_l2, "cosine": feature_cosine, "both": l2_and_cosine}


def width(model: PreTrainedModel) -> int:
    return int(encoder_of(model).config.hidden_size)


def _match(name: str, target: str, loss: FeatureLoss, student: PreTrainedModel, teacher: PreTrainedModel) -> Term:
    if width(student) == width(teacher):
        return match(name, loss, target)
    return Hint(name, loss, width(student), width(teacher), target)


def _embeddings(model: PreTrainedModel) -> str:
    """The path of what goes into the first layer: an ELECTRA projects its embeddings to the width of its layers."""
    projected = [path for path, _ in model.named_modules() if path.split(".")[-1] == "embeddings_project"]
    return projected[0] if projected else _first_named(model, ("embeddings",))


def _first_named(model: PreTrainedModel, names: tuple[str, ...], below: str = "") -> str:
    """The path of the submodule with one of these names, under the path `below`."""
    for path, _ in model.named_modules():
        if path.startswith(f"{below}." if below else "") and path.split(".")[-1] in names:
            return path
    raise UserError(f"{type(model).__name__} has no part called {' or '.join(names)}: leave that weight at 0")
