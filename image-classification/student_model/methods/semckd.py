"""Semantic calibration: each stage of the student learns which of the teacher's it is to follow."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.common.losses import attended_mean, stage_attention
from kd.common.losses.shared import product, unit
from kd.common.methods import Method
from kd.common.objective import Terms, soft_targets, task_loss
from kd.common.outputs import Outputs
from kd.common.utils.errors import UserError
from kd.common.utils.ranges import Positive
from kd.image_classification.student_model.matching import stage_paths
from kd.image_classification.student_model.methods.pair import Pair
from kd.image_classification.teacher_model.backbones.base import conv_norm


def semckd(
    pair: Pair, *, weight: float = 400.0, kl: float = 1.0, temperature: Positive = 4.0, batch: int = 64
) -> Method:
    """Cross-layer distillation with semantic calibration (Chen et al., arXiv:2012.03236), beside labels and soft
    targets (of weight `kl`): each stage of the student follows all of the teacher's, through projections of its own,
    in proportions that attention gives them for each image.

    What attends are rows of similarities to the images of a batch, so that its layers have an input for each of these.
    `batch` is how many there are at most; the scripts know it. The authors skip a batch that is not full. Here images
    that a smaller batch lacks count as similar to none, and a full one is treated as in the authors' code.
    """
    own, target = stage_paths(pair.student), stage_paths(pair.teacher)
    own_shapes, shapes = pair.shapes(own, target)
    calibration = Calibration(
        {path: own_shapes[path].channels for path in own}, {path: shapes[path].channels for path in target}, batch
    )
    terms: Terms = {
        "task": (1.0, task_loss()),
        "soft_targets": (kl, soft_targets(temperature)),
        "calibration": (weight, calibration),
    }
    return Method(terms, {path: path for path in own}, {path: path for path in target})


class Calibration(nn.Module):
    """A term: the mean over images and stages of the student of its squared distance to each stage of the teacher,
    weighted by attention.

    Args:
        own, target: {feature: channels} of the stages of either.
        batch: the largest number of images in a batch.
    """

    def __init__(self, own: Mapping[str, int], target: Mapping[str, int], batch: int) -> None:
        super().__init__()
        self.own, self.target, self.batch = list(own), list(target), batch
        self.queries = nn.ModuleList(embedding(batch) for _ in own)
        self.keys = nn.ModuleList(embedding(batch) for _ in target)
        self.projections = nn.ModuleList(
            nn.ModuleList(projection(channels, wanted) for wanted in target.values()) for channels in own.values()
        )

    def forward(self, student: Outputs, teacher: Outputs | None, labels: Tensor | None) -> Tensor:
        assert student.features and teacher and teacher.features, "calibration needs a teacher's features"
        own, target = [student.features[path] for path in self.own], [teacher.features[path] for path in self.target]
        return attended_mean(self._distances(own, target), self.attention(own, target))

    def attention(self, own: list[Tensor], target: list[Tensor]) -> Tensor:
        """(batch, stages, teacher's stages), each row of which sums to 1; computed in fp32."""
        with torch.autocast(own[0].device.type, enabled=False):
            queries = [unit(embed(self._similarities(maps))) for embed, maps in zip(self.queries, own, strict=True)]
            keys = [unit(embed(self._similarities(maps))) for embed, maps in zip(self.keys, target, strict=True)]
            return stage_attention(torch.stack(queries, dim=1), torch.stack(keys, dim=1))

    def _similarities(self, maps: Tensor) -> Tensor:
        """Scalar products of each image's map with that of every image: (batch, self.batch), ending in zeros."""
        missing = self.batch - len(maps)
        if missing < 0:
            raise UserError(
                f"semckd was built for batches of {self.batch}, this one has {len(maps)} images: pass --method "
                f"semckd:batch={len(maps)}"
            )
        flat = maps.flatten(1)
        return F.pad(product(flat, flat.T), (0, missing))

    def _distances(self, own: list[Tensor], target: list[Tensor]) -> Tensor:
        """Mean squared differences (batch, stages, teacher's stages); the larger of two maps is averaged down."""
        rows = []
        for maps, projections in zip(own, self.projections, strict=True):
            assert isinstance(projections, nn.ModuleList)
            row = [squared_distance(maps, wanted, p) for wanted, p in zip(target, projections, strict=True)]
            rows.append(torch.stack(row, dim=1))
        return torch.stack(rows, dim=1)


def squared_distance(own: Tensor, target: Tensor, projection: nn.Module) -> Tensor:
    """(batch,) the mean squared difference between the student's map, projected, and the teacher's."""
    size = min(own.shape[-1], target.shape[-1])
    projected = projection(F.adaptive_avg_pool2d(own, size))
    wanted = F.adaptive_avg_pool2d(target.detach(), size)
    return (projected.float() - wanted.float()).square().flatten(1).mean(1)


def embedding(batch: int) -> nn.Module:
    """Of rows of similarities (batch, batch) -> (batch, batch / 4)."""
    width = max(1, batch // 4)
    return nn.Sequential(nn.Linear(batch, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))


def projection(channels: int, wanted: int) -> nn.Module:
    """Convolutions of 1x1, 3x3 and 1x1 to a teacher's channels; what they end in may be negative."""
    return nn.Sequential(
        conv_norm(channels, 2 * wanted, kernel=1),
        conv_norm(2 * wanted, 2 * wanted),
        nn.Conv2d(2 * wanted, wanted, 1, bias=False),
    )
