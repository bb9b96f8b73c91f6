"""Layers of text encoders and encoder-decoders: their paths, and cuts, which are smaller models with some of them."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeGuard

from torch import nn
from transformers import AutoModel, PreTrainedModel

from kd.common.methods import depth_map
from kd.common.pretrained import load_model, reading
from kd.common.utils.errors import UserError

SHARED = "albert_layer_groups"  # the list of ALBERT's shared layers


def load_encoder(folder: str | Path) -> PreTrainedModel:
    """Loads an encoder without a head, such as the stage `student_encoder` of a run."""
    with reading(folder, "a text encoder"):
        return load_model(AutoModel, folder, whole=False)


def layer_paths(model: PreTrainedModel) -> list[str]:
    """Paths of the transformer layers, from first to last: `encoder.layer.0`, ... for BERT.

    Raises UserError for a model without a list of its layers: those of ALBERT share their weights, those of Funnel are
    in blocks, and those of XLM are in several lists.
    """
    number = model.config.num_hidden_layers
    lists = [path for path, module in model.named_modules() if _is_list(module) and len(module) == number]
    siblings = [path for path in lists if path.rpartition(".")[0] == lists[0].rpartition(".")[0]]
    if len(siblings) != 1 or siblings[0].endswith(SHARED):
        raise UserError(
            f"{type(model).__name__} has no list of {number} layers, so their outputs cannot be matched: pass "
            "--align_epochs 0, leave --hidden_weight and --attention_weight at 0, and name a student with --student"
        )
    return [f"{siblings[0]}.{i}" for i in range(number)]


def last_layer(model: PreTrainedModel) -> str:
    """Path of the submodule that outputs the hidden states of the last layer, before a final norm if there is one."""
    groups = _shared_groups(model)
    return f"{groups}.{model.config.num_hidden_groups - 1}" if groups else layer_paths(model)[-1]


def _shared_groups(model: PreTrainedModel) -> str | None:
    """Path of ALBERT's groups of layers. The layers of a group share their weights."""
    return next((path for path, module in model.named_modules() if path.endswith(SHARED) and _is_list(module)), None)


def _is_list(module: nn.Module) -> TypeGuard[nn.ModuleList]:
    return isinstance(module, nn.ModuleList)


def kept_layers(model: PreTrainedModel, layers: int) -> list[int]:
    """The layers, counted from 0, that a cut with `layers` layers keeps. They are evenly spaced and include the last
    one, the input of the head: 6 of 12 keeps layers 1, 3, 5, 7, 9 and 11.

    If the first layer has other parameters than the rest, as in ModernBERT, it is kept too: 3 of 6 keeps 0, 2 and 5.
    Raises UserError if `layers` exceeds the number of layers, or if layers that would take another's place differ.
    """
    number = model.config.num_hidden_layers
    if not 1 <= layers <= number:
        raise UserError(f"--student_layers must be between 1 and the teacher's {number}, got {layers}")
    evenly = [old for _, old in depth_map(layers, number)]
    if _shared_groups(model):
        groups = model.config.num_hidden_groups
        shapes: list[Any] = [i * groups // number for i in range(number)]
        built = [i * groups // layers for i in range(layers)]
    else:
        shapes = [_shapes(model.get_submodule(path)) for path in layer_paths(model)]
        built = shapes
    for chosen in (evenly, alternating_layers(layers, number)):
        if all(built[new] == shapes[old] for new, old in enumerate(chosen)):
            return chosen
    raise UserError(
        f"the layers of {type(model).__name__} differ in shape, so no student with {layers} of its {number} layers "
        "can be cut: pass another --student_layers, or name a student with --student"
    )


def _shapes(layer: nn.Module) -> dict[str, Any]:
    return {name: weight.shape for name, weight in layer.state_dict().items()}


def cut_layers(model: PreTrainedModel, layers: int, kept: Sequence[int] = ()) -> PreTrainedModel:
    """A new model of the same class and weights with the `kept_layers` of a larger one. Each of them keeps its kind of
    attention, local or global.

    A layer is initialized from the layer whose output it is aligned to (`depth_map`); DistilBERT keeps layers 0, 2, 4,
    7, 9 and 11 (arXiv:1910.01108, extract_distilbert.py). A cut of ALBERT applies its shared layer fewer times. Raises
    UserError as `kept_layers` does.

    `kept`: The numbers of the layers that are kept instead, from 0.
    """
    chosen = list(kept) or kept_layers(model, layers)
    student = type(model)(_cut_config(model.config, chosen))
    if getattr(model, "pooler", student) is None:
        student.pooler = None  # type: ignore[assignment]
    paths = [] if _shared_groups(model) else layer_paths(model)
    places = {paths[old]: paths[new] for new, old in enumerate(chosen)} if paths else {}
    weights = {}
    for name, tensor in model.state_dict().items():
        layer = next((path for path in paths if name.startswith(f"{path}.")), None)
        if layer is None:
            weights[name] = tensor
        elif layer in places:
            weights[places[layer] + name[len(layer) :]] = tensor
    student.load_state_dict(weights)
    return student


def _cut_config(config: Any, chosen: list[int]) -> Any:
    """A copy of a config for the chosen layers, with the entries of lists that describe each layer, such as the kinds
    of attention (`layer_types`) and of positions (`no_rope_layers`).
    """
    config, number = copy.deepcopy(config), config.num_hidden_layers
    for name, values in list(vars(config).items()):
        if "layer" in name and isinstance(values, list) and len(values) == number:
            setattr(config, name, [values[old] for old in chosen])
    if getattr(config, "attention_types", None):  # those of GPT-Neo, by groups of layers
        config.attention_types = [[[kind], 1] for kind in config.attention_layers]
    config.num_hidden_layers = len(chosen)
    return config


def disable_dropout(model: nn.Module) -> None:
    set_dropout(model, 0.0)


def set_dropout(model: nn.Module, probability: float) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability


# ---- encoder-decoders ----


def cut_translator(model: PreTrainedModel, encoder_layers: int, decoder_layers: int) -> PreTrainedModel:
    """A smaller model of the same class with alternating layers of the larger one, from the first to the last, as in
    "shrink and fine-tune" (arXiv:2010.13002). The first layer stays first: in T5 it holds the position biases.
    """
    numbers = dict(zip(_layer_attributes(model.config), (encoder_layers, decoder_layers), strict=True))
    config = copy.deepcopy(model.config)
    config.update(numbers)
    student = type(model)(config)
    student.load_state_dict(
        model.state_dict(), strict=False
    )  # all parameters outside the layers, and the first layers
    for new, old in ((student.get_encoder(), model.get_encoder()), (student.get_decoder(), model.get_decoder())):
        chosen = alternating_layers(len(_layers(new)), len(_layers(old)))
        for layer, number in zip(_layers(new), chosen, strict=True):
            layer.load_state_dict(_layers(old)[number].state_dict())
    student.generation_config = copy.deepcopy(model.generation_config)
    return student


def alternating_layers(kept: int, layers: int) -> list[int]:
    """Evenly spaced layers (from 0) with the first and the last: 3 of 6 gives 0, 2, 5, and 6 of 12 gives 0, 2, 4, 7,
    9, 11, as in DistilBERT (arXiv:1910.01108, extract_distilbert.py).
    """
    return [round(i * (layers - 1) / max(kept - 1, 1)) for i in range(kept)]


def number_of_layers(model: PreTrainedModel) -> tuple[int, int]:
    """Numbers of layers of encoder and decoder."""
    return len(_layers(model.get_encoder())), len(_layers(model.get_decoder()))


def _layer_attributes(config: Any) -> tuple[str, str]:
    """Names of the config's numbers of layers of encoder and decoder, in Marian and BART or in T5."""
    if hasattr(config, "encoder_layers"):
        return "encoder_layers", "decoder_layers"
    return "num_layers", "num_decoder_layers"


def _layers(stack: Any) -> nn.ModuleList:
    for name in ("layers", "block"):
        if isinstance(getattr(stack, name, None), nn.ModuleList):
            return getattr(stack, name)
    raise UserError(f"{type(stack).__name__} has no list of layers: name a student with --student")
