"""Any network as a backbone: its classifier is removed, and its last grid of features is returned as a map.

A grid is the output of a submodule with a feature vector for each position: a map (batch, channels, h, w), the same
with channels last, or tokens (batch, prefix + h * w, channels), whose first tokens, such as a class token, have no
position.
`kd.image_classification.teacher_model.backbones.structure` finds the grids of a network.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from kd.common.outputs import FeatureHooks
from kd.image_classification.teacher_model.backbones.base import Backbone

Layout = Literal["channels first", "channels last", "tokens"]


@dataclass(frozen=True)
class Grid:
    """The output of the submodule at `path`. prefix: number of tokens without a position. relu: whether a ReLU follows
    that is no submodule.
    """

    path: str
    layout: Layout = "channels first"
    prefix: int = 0
    relu: bool = False


@dataclass(frozen=True)
class Structure:
    """Where a network has its features, as stored in the configuration of a classifier.

    heads: paths of the linear classifiers of its class tokens, whose logits are averaged; none if the network does not
        end in a linear layer. Its logits are then the features.
    width: of their inputs, concatenated.
    last: the grid that the classifier pools; None if there is none. The input of the classifier is then a 1x1 map.
    channels: of the map, `width / pool²`.
    pool: size to which the map is averaged for the classifier; 1 for a global average.
    exact: whether this average alone is the input of the classifier.
    stages: the grids at the ends of its stages, or of its blocks if all have the same size (`same_size`).
    """

    heads: list[str]
    width: int
    channels: int
    last: Grid | None = None
    pool: int = 1
    exact: bool = False
    stages: list[Grid] = field(default_factory=list)
    same_size: bool = False

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Structure":
        last = values["last"] and Grid(**values["last"])
        return cls(**(values | {"last": last, "stages": [Grid(**grid) for grid in values["stages"]]}))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class ToMap(nn.Module):
    """A grid in its layout -> map (batch, channels, h, w)."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, features: Tensor) -> Tensor:
        if self.grid.layout == "channels last":
            features = rearrange(features, "batch h w channels -> batch channels h w")
        elif self.grid.layout == "tokens":
            tokens = features[:, self.grid.prefix :]
            side = round(tokens.shape[1] ** 0.5)
            features = rearrange(tokens, "batch (h w) channels -> batch channels h w", h=side)
        return features.relu() if self.grid.relu else features


class NetworkBackbone(Backbone):
    """A network of any make without its classifier: images (batch, 3, h, w) -> map (batch, channels, h', w').

    The average of the map is the input of the network's classifier. Where the network computes that input in another
    way, from a class token or with a layer norm after pooling, the map is the last grid plus the same vector at all
    positions, which makes its average equal to it. So the positions keep their differences, and the linear classifier
    of the average map has exactly the logits of the network.

    Args:
        network: with its classifiers, which are removed.
        structure: of `find_structure(network, ...)`.
    """

    def __init__(self, network: nn.Module, structure: Structure) -> None:
        super().__init__()
        for path in structure.heads:
            network.set_submodule(path, nn.Identity())
        modules: list[Any] = list(network.modules())
        for module in modules:
            if getattr(module, "inplace", False):
                module.inplace = False  # a hook may have recorded the module's input
            for name, buffer in list(module.named_buffers(recurse=False)):
                module.register_buffer(name, buffer)  # persistent: from_pretrained restores only saved buffers
        self.network, self.structure = network, structure
        self.num_features = structure.channels
        self.last_map = None if structure.last is None else ToMap(structure.last)
        self.stage_maps = nn.ModuleList(ToMap(grid) for grid in structure.stages)
        self.stages = [f"stage_maps.{number}" for number in range(len(structure.stages))]
        grids = [*structure.stages, *([structure.last] if structure.last else [])]
        self._paths = {path: path for path in [*structure.heads, *(grid.path for grid in grids)]}

    def forward(self, x: Tensor) -> Tensor:
        features, output = self._run(x)
        heads = [features[path] for path in self.structure.heads]
        pooled = torch.cat(heads, dim=-1) if heads else logits_of(output)
        for grid, to_map in zip(self.structure.stages, self.stage_maps, strict=True):
            to_map(features[grid.path])  # hooks record its output
        if self.last_map is None or self.structure.last is None:
            return rearrange(pooled, "batch width -> batch width 1 1")
        last = self.last_map(features[self.structure.last.path])
        copies = self.structure.channels // last.shape[1]  # one for each class token with a classifier
        last = repeat(last, "batch c h w -> batch (copies c) h w", copies=copies)
        return last if self.structure.exact else with_average(last, pooled, self.structure.pool)

    def _run(self, x: Tensor) -> tuple[dict[str, Tensor], Any]:
        """The outputs of the recorded submodules, which are the inputs of the classifiers and the grids; and the
        output of the network.
        """
        hooks = FeatureHooks(self.network, self._paths)
        try:
            output = self.network(x)
            return hooks.take(), output
        finally:
            hooks.remove()


def logits_of(output: Any) -> Any:
    """The logits in an output: a tensor, an output with `logits`, or a dictionary or tuple with them first."""
    if isinstance(output, dict):
        return output.get("logits", next(iter(output.values()), None))
    return output[0] if isinstance(output, tuple | list) and output else getattr(output, "logits", output)


def average_pooled(maps: Tensor, pool: int) -> Tensor:
    """Maps (batch, channels, h, w) -> (batch, channels * pool²), the averages of pool x pool parts."""
    if pool == 1:
        return maps.mean((2, 3))
    return F.adaptive_avg_pool2d(maps, pool).flatten(1)


def with_average(maps: Tensor, pooled: Tensor, pool: int = 1) -> Tensor:
    """Maps (batch, channels, h, w) plus the same vector at all positions, so that `average_pooled` is `pooled`
    (batch, channels * pool²). With pool > 1 each of the pool x pool parts has its vector.
    """
    gap = pooled - average_pooled(maps, pool)
    vectors = rearrange(gap, "batch (c ph pw) -> batch c ph pw", ph=pool, pw=pool)
    return maps + F.interpolate(vectors, size=maps.shape[2:])
