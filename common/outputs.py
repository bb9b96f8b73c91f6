"""Named outputs of any model, teacher or student, in any domain: logits, and features recorded by forward hooks."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import einsum, reduce
from torch import Tensor, nn
from transformers.utils import ModelOutput

from kd.common.utils.errors import UserError


@dataclass
class Outputs(ModelOutput):
    """logits (batch, classes), features {name: (batch, ...)}, mask (batch, positions) of the positions that are not
    padding and have features, sample_id (batch,) of the training samples, for terms with a memory, and whether the
    student sampled the batch (None: no).

    It is a ModelOutput because accelerate casts the bf16 tensors of an autocast forward back to fp32 only inside one.
    """

    logits: Tensor | None = None
    features: dict[str, Tensor] | None = field(default=None)
    mask: Tensor | None = None
    sample_id: Tensor | None = None
    sampled: bool | None = None


def require(value: Tensor | None, name: str) -> Tensor:
    """The value of an output. Raises UserError if there is none."""
    if value is None:
        raise UserError(f"the objective needs {name}, and this batch has none: choose another method")
    return value


class FeatureHooks:
    """Records the outputs of submodules by name: `FeatureHooks(bert, {"layer_2": "encoder.layer.1"})`. Of several
    outputs it is the first; that of the model itself, at the path "", is the last hidden state of an encoder.

    Call the model, then `take()` the features of that call. Raises ValueError for a path that the model lacks.
    """

    def __init__(self, model: nn.Module, paths: dict[str, str]) -> None:
        modules = dict(model.named_modules())
        missing = [path for path in paths.values() if path not in modules]
        if missing:
            raise ValueError(f"{type(model).__name__} has no submodule {', '.join(missing)}")
        self._features: dict[str, Tensor] = {}
        self._handles = [modules[path].register_forward_hook(self._recorder(name)) for name, path in paths.items()]

    def _recorder(self, name: str) -> Any:
        def record(module: nn.Module, inputs: Any, output: Any) -> None:
            self._features[name] = output[0] if isinstance(output, tuple | ModelOutput) else output

        return record

    def take(self) -> dict[str, Tensor]:
        """Returns the features of the last call and clears them, so that no graph is kept alive."""
        features, self._features = self._features, {}
        return features

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def call_with_hooks(
    model: nn.Module, hooks: FeatureHooks, inputs: dict[str, Any], without: frozenset[str] = frozenset()
) -> Outputs:
    """Calls any model without some of the inputs. Returns its output with the features that its hooks recorded."""
    output = model(**{name: value for name, value in inputs.items() if name not in without})
    logits = output.get("logits") if hasattr(output, "get") else getattr(output, "logits", None)
    features = (output.get("features") if hasattr(output, "get") else None) or {}
    return Outputs(logits=logits, features={**features, **hooks.take()}, mask=inputs.get("attention_mask"))


class EnsembleTeacher(nn.Module):
    """Several teachers of the same inputs as one. It outputs the weighted mean of their logits (`mean_logits`), and
    that of each of the named `features` that all of them output. `weights`: one per teacher (default: equal).
    """

    def __init__(
        self, teachers: Iterable[nn.Module], features: Sequence[str] = (), weights: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        self.teachers, self.features, self.weights = nn.ModuleList(teachers), tuple(features), weights

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, *args: Any, **inputs: Any) -> Outputs:
        outputs: list[Outputs] = [teacher(*args, **inputs) for teacher in self.teachers]
        means = {}
        for name in self.features:
            values = [one.features[name] for one in outputs if one.features and name in one.features]
            if len(values) == len(outputs):
                means[name] = weighted_mean(values, self.weights)
        return Outputs(logits=mean_logits(outputs, self.weights), features=means)


def mean_logits(outputs: Sequence[Outputs], weights: Sequence[float] | None = None) -> Tensor | None:
    """The weighted mean of the logits (batch, classes) of several teachers. Its softmax is the normalized geometric
    mean of their distributions (Hinton et al., arXiv:1503.02531). None if no teacher outputs logits.

    Used in every domain: by `EnsembleTeacher`, and for the cached outputs of teachers with different tokenizers
    (`JoinedOutputs`).
    """
    logits = [one.logits for one in outputs if one.logits is not None]
    return weighted_mean(logits, weights) if logits else None


def weighted_mean(tensors: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """The mean of tensors of one shape, in fp32. `weights`: one positive number per tensor (default: equal)."""
    if weights is None:
        return reduce([tensor.float() for tensor in tensors], "teacher ... -> ...", "mean")
    if len(weights) != len(tensors):
        raise ValueError(f"{len(tensors)} teachers need as many weights, got {len(weights)}")
    shares = torch.tensor(weights, device=tensors[0].device) / sum(weights)
    return einsum(torch.stack([tensor.float() for tensor in tensors]), shares, "teacher ..., teacher -> ...")
