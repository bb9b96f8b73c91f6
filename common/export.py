"""Models that leave this project: as ONNX graphs and with int8 weights, for a CPU.

ONNX comes from torch.export (`dynamo=True`), the exporter that is maintained: the older one follows one example, and
writes the sizes that this example happened to have into the graph of a bottleneck.

Dynamic quantisation keeps weights in int8 and scales activations as they come, so it needs no calibration data. In
torch it is written out below, on `torch._int_mm`: torch.ao.quantization is deprecated, its weights are no safetensors,
and its successor torchao does the same arithmetic through tensor subclasses, which without a compiler are slower than
fp32. ONNX Runtime has its own.
"""

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from onnxruntime import quantization
from safetensors.torch import load_model
from torch import Tensor, nn

from common.metrics.cost import latency
from common.outputs import Outputs

# Convolutions stay fp32: on a CPU they gain from static quantisation only, which needs calibration data.
QUANTIZED = ("MatMul", "Gemm", "Gather")


# ---------------------------------------------------------------- ONNX


class _Logits(nn.Module):
    """A model as a graph sees it: inputs by position, one tensor out."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, inputs, strict=True))).logits


def to_onnx(model: nn.Module, inputs: dict[str, Tensor], path: str | Path, dynamic: dict[int, str]) -> None:
    """Writes `model`, in eval mode, as an ONNX graph in one file (2 GB at most): inputs by name -> `logits`.

    `inputs` are an example on the model's device; `dynamic` names those of their axes whose size may change, of every
    input alike: {0: "batch", 1: "position"}. Raises ValueError where the example has size 1 there, because that would
    be taken for a constant.
    """
    fixed = [name for name, value in inputs.items() if any(value.shape[axis] < 2 for axis in dynamic)]
    if fixed:
        raise ValueError(f"the example of {', '.join(fixed)} must have at least 2 along the axes {list(dynamic)}")
    with _quiet(), torch.no_grad():
        torch.onnx.export(
            _Logits(model, list(inputs)).eval(),
            tuple(inputs.values()),
            path,
            input_names=list(inputs),
            output_names=["logits"],
            dynamic_shapes=(tuple(dynamic for _ in inputs),),
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def quantize_onnx(path: str | Path, path_int8: str | Path) -> None:
    """Writes the ONNX graph `path` with int8 weights of matrix products and lookups.

    One scale per output, and 7 of 8 bits (`reduce_range`), without which sums saturate on CPUs that have no VNNI.
    Products with a stack of matrices, such as the keys of a bottleneck, stay fp32: there is no int8 kernel for them.
    """
    model = onnx.load(path)
    model.graph.ClearField("value_info")  # shapes of weights that quantisation transposes; it infers them itself
    stacks = {weight.name for weight in model.graph.initializer if len(weight.dims) > 2}
    with _quiet():
        quantization.quantize_dynamic(
            model,
            Path(path_int8),
            op_types_to_quantize=list(QUANTIZED),
            nodes_to_exclude=[node.name for node in model.graph.node if stacks & set(node.input)],
            per_channel=True,
            reduce_range=True,
        )


class OnnxModel(nn.Module):
    """An ONNX file behind the call of the model that it was made from, on the CPU with torch's number of threads."""

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def forward(self, **inputs: Tensor) -> Outputs:
        (logits,) = self.session.run(["logits"], {name: value.cpu().numpy() for name, value in inputs.items()})
        return Outputs(logits=torch.from_numpy(logits))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' remarks on their own insides."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# ---------------------------------------------------------------- int8 in torch


class Int8Linear(nn.Module):
    """A linear layer with int8 weights, one scale per output, and int8 activations, one scale per row; sums in int32.

    Symmetric, with scales max|x| / 127 (Q8BERT, arXiv:1910.06188). For inference on a CPU.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = _to_int8(linear.weight.detach())
        self.register_buffer("weight", weight)  # (out, in)
        self.register_buffer("scale", scale.squeeze(-1))  # (out,)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        rows, row_scale = _to_int8(x.reshape(-1, x.shape[-1]))
        y = torch._int_mm(rows, self.weight.t()) * row_scale * self.scale
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], -1)


class Int8Embedding(nn.Module):
    """An embedding table with int8 weights and one scale per row."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        weight, scale = _to_int8(embedding.weight.detach())
        self.register_buffer("weight", weight)  # (rows, width)
        self.register_buffer("scale", scale)  # (rows, 1)

    weight: Tensor
    scale: Tensor

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight) * F.embedding(ids, self.scale)


def _to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (rows, width) as int8 and their scales (rows, 1)."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny) / 127
    return (x / scale).round().to(torch.int8), scale


INT8: dict[type[nn.Module], Any] = {nn.Linear: Int8Linear, nn.Embedding: Int8Embedding}


def quantize_dynamic(model: nn.Module) -> Any:
    """A copy of `model`, for inference on a CPU, with all its linear layers and embeddings in int8.

    Subclasses of the two are left alone: who uses them may read their weights. Its `state_dict` holds plain tensors.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) in INT8:
                setattr(module, name, INT8[type(child)](child))
    return model


def load_int8(model: nn.Module, path: str | Path) -> Any:
    """What `safetensors.torch.save_model` made of a quantised model, in the architecture of `model`, whose own weights
    do not matter.
    """
    quantized = quantize_dynamic(model)
    load_model(quantized, path)
    return quantized


# ---------------------------------------------------------------- what it gains


def interleaved_latency(
    models: dict[str, tuple[nn.Module, dict[str, Tensor]]], repeats: int = 100
) -> dict[str, dict[str, Any]]:
    """`common.metrics.cost.latency` of several models and their inputs, in turns: whatever else the machine does hits
    all of them alike. Each turn has a warm-up, because the one before leaves other weights in the cache.
    """
    turns = [{n: latency(model, inputs, 1, 1) for n, (model, inputs) in models.items()} for _ in range(repeats)]
    found = {}
    for name in models:
        milliseconds = [turn[name]["median"] for turn in turns]
        found[name] = turns[0][name] | {
            "median": float(np.median(milliseconds)),
            "p90": float(np.quantile(milliseconds, 0.9)),
        }
    return found
