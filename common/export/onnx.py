"""Models as ONNX graphs and as torch.export programs.

Both use torch.export (for ONNX: `dynamo=True`). The older ONNX exporter traces one example, whose sizes become
constants in the graph of a bottleneck. int8 graphs come from ONNX Runtime's dynamic quantization.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from onnxruntime import quantization
from torch import Tensor, nn

from kd.common.outputs import Outputs

# Convolutions stay fp32: on a CPU only static quantization makes them faster, and it needs calibration data.
QUANTIZED = ("MatMul", "Gemm", "Gather")

Axes = dict[int, str]  # axes of variable size and their names: {0: "batch", 1: "position"}


# ---------------------------------------------------------------- a graph, in either format


class _Graph(nn.Module):
    """Calls a model with positional inputs and returns one tensor."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        return get_logits(self.model(**dict(zip(self.names, inputs, strict=True))))


def get_logits(outputs: Any) -> Tensor:
    """Returns the logits of a model's outputs; a tensor is returned unchanged."""
    return outputs if isinstance(outputs, Tensor) else outputs.logits


def to_onnx(
    model: nn.Module, inputs: dict[str, Tensor], path: str | Path, axes: Axes | dict[str, Axes], output: str = "logits"
) -> None:
    """Writes `model`, in eval mode, as an ONNX graph in one file (at most 2 GB). It maps named inputs to `output`, the
    tensor of `get_logits`.

    `inputs` are an example on the model's device. `axes` are the axes of variable size, for all inputs or by input.
    Raises ValueError if the example has size 1 along one, because that would become a constant.
    """
    shapes = tuple(axes_by_input(inputs, axes).values())
    with _quiet(), torch.no_grad():
        torch.onnx.export(
            _Graph(model, list(inputs)).eval(),
            tuple(inputs.values()),
            path,
            input_names=list(inputs),
            output_names=[output],
            dynamic_shapes=(shapes,),
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def to_program(model: nn.Module, inputs: dict[str, Tensor], path: str | Path, axes: Axes | dict[str, Axes]) -> None:
    """Writes `model`, in eval mode, as a torch.export program with positional inputs in the order of `inputs`. See
    `to_onnx` for the arguments.
    """
    dynamic = torch.export.Dim.DYNAMIC
    shapes = tuple(dict.fromkeys(by_input, dynamic) for by_input in axes_by_input(inputs, axes).values())
    with _quiet(), torch.no_grad():
        graph = _Graph(model, list(inputs)).eval()
        program = torch.export.export(graph, tuple(inputs.values()), dynamic_shapes=(shapes,))
        torch.export.save(program, path)


def load_program(path: str | Path) -> nn.Module:
    """Loads a program that `to_program` wrote; it takes positional inputs."""
    with _quiet():
        return torch.export.load(path).module()


def axes_by_input(inputs: dict[str, Tensor], axes: Axes | dict[str, Axes]) -> dict[str, Axes]:
    """Returns the variable axes of each input. `axes` are the same for all inputs, or by input. Raises ValueError as
    `to_onnx`.
    """
    by_input: Any = axes if axes.keys() == inputs.keys() else dict.fromkeys(inputs, axes)
    fixed = [name for name, value in inputs.items() if any(value.shape[axis] < 2 for axis in by_input[name])]
    if fixed:
        raise ValueError(f"the example of {', '.join(fixed)} must have at least 2 along the axes {axes}")
    return by_input


def quantize_onnx(path: str | Path, path_int8: str | Path) -> None:
    """Quantizes the weights of matrix products and embeddings of the ONNX graph `path` to int8.

    Uses one scale per output and 7 of 8 bits (`reduce_range`); otherwise sums saturate on CPUs without VNNI. Products
    with a stack of matrices, such as the keys of a bottleneck, stay fp32: they have no int8 kernel.
    """
    model = onnx.load(path)
    model.graph.ClearField("value_info")  # shapes that change with the transposed weights; they are inferred again
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
    """Runs an ONNX file like the exported model, on the CPU with torch's number of threads."""

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def predict(self, **inputs: Tensor) -> Tensor:
        """Returns the output of the graph."""
        (output,) = self.session.run(None, {name: value.cpu().numpy() for name, value in inputs.items()})
        return torch.from_numpy(output)

    def forward(self, **inputs: Tensor) -> Outputs:
        return Outputs(logits=self.predict(**inputs))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the exporters' warnings."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
