"""Layers of text encoders and encoder-decoders: their paths, and cuts, which are smaller models with some of them."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModel, PreTrainedModel

from kd.common.methods import depth_map
from kd.common.pretrained import load_model, reading
from kd.common.utils.errors import UserError


def load_encoder(folder: str | Path) -> PreTrainedModel:
    """Loads an encoder without a head, such as the stage `student_encoder` of a run."""
    with reading(folder, "a text encoder"):
        return load_model(AutoModel, folder, whole=False)


def layer_paths(model: PreTrainedModel) -> list[str]:
    """Paths of the transformer layers, from first to last: `encoder.layer.0`, ... for BERT."""
    number = model.config.num_hidden_layers
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == number:
            return [f"{path}.{i}" for i in range(number)]
    raise UserError(f"{type(model).__name__} has no list of {number} layers; distilling its layers is not supported")


def check_cut(model: PreTrainedModel, layers: int) -> None:
    """Raises UserError if `layers` exceeds the number of layers, or if a kept layer has parameters of other shapes
    than the layer that it replaces.
    """
    paths = layer_paths(model)
    if not 1 <= layers <= len(paths):
        raise UserError(f"--student_layers must be between 1 and the teacher's {len(paths)}, got {layers}")
    built = [{n: w.shape for n, w in model.get_submodule(path).state_dict().items()} for path in paths]
    if any(built[new] != built[old] for new, old in depth_map(layers, len(paths))):
        raise UserError(
            f"the layers of {type(model).__name__} differ in shape, so no student with {layers} of its {len(paths)} "
            "layers can be cut: name a student with --student"
        )


def cut_layers(model: PreTrainedModel, layers: int, kept: Sequence[int] = ()) -> PreTrainedModel:
    """A new model of the same class and weights with `layers` evenly spaced layers: 6 of 12 keeps layers 1, 3, 5, 7, 9
    and 11 (from 0). DistilBERT keeps layers 0, 2, 4, 7, 9 and 11 (arXiv:1910.01108, extract_distilbert.py). Here a
    layer is initialized from the layer whose output it is aligned to (`depth_map`), and the last layer, the input of
    the head, is always kept. Raises UserError as `check_cut` does.

    `kept`: the numbers of the layers that are kept instead, from 0.
    """
    check_cut(model, layers)
    paths = layer_paths(model)
    chosen = list(kept) or [old for _, old in depth_map(layers, len(paths))]
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):  # kinds of attention by layer, in Qwen and Gemma
        config.layer_types = [config.layer_types[old] for old in chosen]
    if getattr(config, "attention_types", None):  # the same in GPT-Neo, by groups of layers
        config.attention_layers = [config.attention_layers[old] for old in chosen]
        config.attention_types = [[[kind], 1] for kind in config.attention_layers]
    student = type(model)(config)
    if getattr(model, "pooler", student) is None:
        student.pooler = None  # type: ignore[assignment]
    places = {paths[old]: paths[new] for new, old in enumerate(chosen)}
    weights = {}
    for name, tensor in model.state_dict().items():
        layer = next((path for path in paths if name.startswith(f"{path}.")), None)
        if layer is None:
            weights[name] = tensor
        elif layer in places:
            weights[places[layer] + name[len(layer) :]] = tensor
    student.load_state_dict(weights)
    return student


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
    """Evenly spaced layers (from 0) with the first and the last: 3 of 6 gives 0, 2, 5."""
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
