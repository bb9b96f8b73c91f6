"""Narrower copies of encoders in the layout of BERT, without some hidden channels, heads and feed-forward neurons.

As in width pruning of language models (arXiv:2407.14679), those with the largest activations or weights are kept, and
the narrower model is the start of a distillation.
"""

import copy

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kd.common.training.inference import Collate, run_inference
from kd.common.utils.errors import UserError
from kd.nlp.student_model.layers import layer_paths

LAYOUT = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)  # the matrices of a layer of BERT, RoBERTa and ELECTRA
Axes = dict[str, Tensor]  # the kept indices of hidden channels, of the channels of heads, and of neurons


def check_narrow(model: PreTrainedModel, width: int) -> None:
    """Raises UserError if a narrower copy of this width cannot be made."""
    old = model.config.hidden_size
    head = old // model.config.num_attention_heads
    if not (0 < width < old and width % head == 0):
        raise UserError(
            f"--student_width must be a multiple of {head}, the width of a head, and less than the teacher's {old}, "
            f"got {width}"
        )
    paths = [path for path, _ in model.get_submodule(layer_paths(model)[0]).named_modules()]
    if missing := [name for name in LAYOUT if name not in paths]:
        raise UserError(
            f"--student_width needs the layout of BERT, and a layer of {type(model).__name__} has no {missing[0]}: "
            "leave it out"
        )


def narrow(model: PreTrainedModel, width: int, importance: Tensor) -> PreTrainedModel:
    """A new model with `width` hidden channels, and with as large a share of the heads and of the neurons.

    `importance` (old width,) ranks the hidden channels. Heads and neurons are ranked by the norms of the weights that
    write to and read from them. Raises UserError as `check_narrow` does.
    """
    check_narrow(model, width)
    config, old = copy.deepcopy(model.config), model.config.hidden_size
    config.hidden_size = width
    config.num_attention_heads = config.num_attention_heads * width // old
    config.intermediate_size = config.intermediate_size * width // old
    narrowed = type(model)(config)
    weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    hidden = _largest(importance, width)
    kept = {path: _kept_in_layer(weights, path, hidden, config, old) for path in layer_paths(model)}
    outside = {"hidden": hidden}
    for name, tensor in weights.items():
        layer = next((path for path in kept if name.startswith(f"{path}.")), None)
        weights[name] = _pruned(name, tensor, kept[layer] if layer else outside)
    narrowed.load_state_dict(weights)
    return narrowed


def channel_importance(model: PreTrainedModel, rows: object, collate: Collate) -> Tensor:
    """The variance (width,) of each hidden channel over the tokens of texts, summed over the layers."""

    def call(**batch: Tensor) -> dict[str, Tensor]:
        return {"hidden": torch.stack(model(**batch, output_hidden_states=True).hidden_states, dim=2)}

    states = run_inference(model, call, rows, collate)["hidden"]  # (positions, layers, width) of each text
    return torch.cat(states).var(dim=0).sum(dim=0)


def _kept_in_layer(weights: dict[str, Tensor], layer: str, hidden: Tensor, config: object, old: int) -> Axes:
    heads, width = config.num_attention_heads, len(hidden)  # type: ignore[attr-defined]
    head = width // heads
    channels = _strength(weights, f"{layer}.attention.self.value", f"{layer}.attention.output.dense")
    strongest = _largest(channels.unflatten(0, (old // head, head)).sum(1), heads)
    neurons = _strength(weights, f"{layer}.intermediate.dense", f"{layer}.output.dense")
    return {
        "hidden": hidden,
        "heads": torch.cat([torch.arange(head) + head * number for number in strongest]),
        "neurons": _largest(neurons, config.intermediate_size),  # type: ignore[attr-defined]
    }


def _strength(weights: dict[str, Tensor], writes: str, reads: str) -> Tensor:
    """The product of the norms of the weights that write to each channel and read from it."""
    return weights[f"{writes}.weight"].norm(dim=1) * weights[f"{reads}.weight"].norm(dim=0)


def _largest(values: Tensor, number: int) -> Tensor:
    return values.topk(number).indices.sort().values


def _pruned(name: str, tensor: Tensor, kept: Axes) -> Tensor:
    """The kept rows and columns of a weight, or the kept entries of a bias."""
    if ".attention.self." in name:
        axes = "heads", "hidden"
    elif ".attention.output.dense" in name:
        axes = "hidden", "heads"
    elif ".intermediate." in name:
        axes = "neurons", "hidden"
    elif ".output.dense" in name:
        axes = "hidden", "neurons"
    else:
        axes = "hidden", "hidden"
    if name.startswith("embeddings.") and tensor.dim() == 2:  # a row per token or position
        return tensor[:, kept["hidden"]]
    for dimension in range(tensor.dim()):
        tensor = tensor.index_select(dimension, kept[axes[dimension]])
    return tensor
