"""Folding batch norms into the convolutions before them: the same function in eval mode, with half the layers."""

import copy

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kd.image_classification.teacher_model.classifier import ImageClassifier


def folded(model: nn.Module) -> nn.Module:
    """A copy of a network for evaluation alone, whose batch norms are folded into the convolutions that they follow.

    Its submodules keep their paths. What cannot be traced is left as it is.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for conv_path, norm_path in _pairs(model):
        conv, norm = model.get_submodule(conv_path), model.get_submodule(norm_path)
        assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
        model.set_submodule(conv_path, fuse_conv_bn_eval(conv, norm))
        model.set_submodule(norm_path, nn.Identity())
    return model


def frozen(classifier: ImageClassifier, precision: str) -> ImageClassifier:
    """A folded copy that answers as fast as it can: channels_last, and in bf16 weights where that is the precision."""
    answering = copy.deepcopy(classifier).eval().requires_grad_(False)
    answering.backbone = folded(answering.backbone)
    answering.projector = answering.projector and folded(answering.projector)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    for part in filter(None, (answering.backbone, answering.projector)):
        part.to(dtype=dtype, memory_format=torch.channels_last)
    return answering


def _pairs(model: nn.Module) -> list[tuple[str, str]]:
    """(path of a convolution, path of the batch norm that alone reads it), by following the data through the graph."""
    try:
        graph = fx.symbolic_trace(model).graph
    except (fx.proxy.TraceError, TypeError, RuntimeError, AttributeError, NotImplementedError):
        return []
    modules = dict(model.named_modules())
    pairs = []
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if (
            isinstance(before, fx.Node)
            and before.op == "call_module"
            and len(before.users) == 1
            and type(modules[str(node.target)]) is nn.BatchNorm2d
            and type(modules[str(before.target)]) is nn.Conv2d
        ):
            pairs.append((str(before.target), str(node.target)))
    return pairs
