"""Methods that match several maps of student and teacher at once.

Knowledge review fuses the student's maps from the deepest to the first. Semantic calibration learns which stages of
the teacher each stage of the student matches.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from kd.common.losses import attended_mean, hierarchical_l2, stage_attention
from kd.common.losses.shared import product, unit
from kd.common.methods import Feature, Method, TaskSpec, depth_map, hooked, labels
from kd.common.objective import Terms, average_down, soft_targets, warm_up
from kd.common.outputs import Outputs
from kd.common.utils.errors import UserError
from kd.common.utils.ranges import Positive, Share
from kd.image_classification.student_model.matching import maps_before_relu
from kd.image_classification.teacher_model.backbones.base import conv_norm

WIDEST = 512  # maximum number of channels of the maps that knowledge review fuses


def reviewkd(spec: TaskSpec, *, weight: float = 5.0, warmup: Share = 20 / 240) -> Method:
    """Knowledge review (Chen et al., arXiv:2104.09044), plus the labels. The student's stages and pooled features are
    fused from the last to the first, and match the teacher's maps before the last ReLU and its pooled features.

    For a teacher that does not expose its maps before a ReLU, the outputs of its stages are matched. If one network
    has more stages, its first stages are left out. The weight rises with every step over the share `warmup` of the
    training; in the authors' code it rises with every epoch, from 0 in the first. Their weight differs by pair. They
    train with batches of 128, a learning rate of 0.1 (ShuffleNets 0.02) and Nesterov momentum; the protocol of the
    tables has batches of 64, a learning rate of 0.05 and no Nesterov momentum.
    """
    stages, teacher_maps = spec.student_features.stages, maps_before_relu(spec.teacher)
    pairs = [(stages[i], teacher_maps[j]) for i, j in depth_map(len(stages), len(teacher_maps), "last")]
    pairs += [(spec.student_features.head, spec.teacher_features.head)]  # pooled
    return labels() + Method(
        {"review": (warm_up(weight, warmup), Review(pairs))},
        hooked(*(student for student, _ in pairs)),
        hooked(*(teacher for _, teacher in pairs)),
    )


class Review(nn.Module):
    """A term: the sum over levels of `losses.hierarchical_l2` between the fused map and the teacher's.

    Args:
        pairs: maps of student and teacher for each level. Those of the last, deepest level are pooled.
    """

    def __init__(self, pairs: Sequence[tuple[Feature, Feature]]) -> None:
        super().__init__()
        self.names = [(student.path, teacher.path) for student, teacher in pairs]
        middle, deepest = min(WIDEST, pairs[-1][0].width), len(pairs) - 1
        self.levels = nn.ModuleList(
            Fusion(student.width, middle, teacher.width, fuses=level < deepest)
            for level, (student, teacher) in enumerate(pairs)
        )

    def forward(self, student: Outputs, teacher: Outputs | None, labels: Tensor | None) -> Tensor:
        assert student.features and teacher and teacher.features, "a review needs a teacher's features"
        losses, deeper = [], None
        for level, (name, teacher_name) in zip(reversed(self.levels), reversed(self.names), strict=True):
            maps, teacher_maps = student.features[name], teacher.features[teacher_name]
            if deeper is None:
                maps, teacher_maps = (reduce(x, "b c h w -> b c 1 1", "mean") for x in (maps, teacher_maps))
            reviewed, deeper = level(maps, deeper, teacher_maps.shape[-1])
            losses.append(hierarchical_l2(reviewed, teacher_maps))
        return torch.stack(losses).sum()


class Fusion(nn.Module):
    """Fuses a map of the student (batch, channels, h, w) with the fused map of the next deeper level. Returns a map to
    compare with the teacher's (batch, target_channels, size, size), and the fused map (batch, middle, size, size).

    Attention weighs the two maps at each position. `fuses` is false for the deepest level, which has no deeper map.
    """

    def __init__(self, channels: int, middle: int, target_channels: int, fuses: bool) -> None:
        super().__init__()
        self.enter = conv_norm(channels, middle, kernel=1, relu=False)
        self.leave = conv_norm(middle, target_channels, relu=False)
        for layers in (self.enter, self.leave):
            nn.init.kaiming_uniform_(layers[0].get_parameter("weight"), a=1)
        self.attention = nn.Sequential(nn.Conv2d(2 * middle, 2, 1), nn.Sigmoid()) if fuses else None

    def forward(self, maps: Tensor, deeper: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
        fused = self.enter(maps)
        if self.attention is not None:
            assert deeper is not None
            deeper = F.interpolate(deeper, maps.shape[2:])
            shares = self.attention(torch.cat([fused, deeper], dim=1))  # (batch, 2, h, w)
            fused = shares[:, :1] * fused + shares[:, 1:] * deeper
        if fused.shape[-1] != size:
            fused = F.interpolate(fused, (size, size))
        return self.leave(fused), fused


def semckd(
    spec: TaskSpec, *, weight: float = 400.0, kl: float = 1.0, temperature: Positive = 4.0, batch: int = 64
) -> Method:
    """Cross-layer distillation with semantic calibration (SemCKD, Chen et al., arXiv:2012.03236), plus labels and soft
    targets (weight `kl`). Each stage of the student matches all stages of the teacher, each through a projection,
    weighted by attention for each image.

    The inputs of the attention are similarities to all images of a batch, so its layers have the width `batch`, the
    largest batch size. The scripts set it. The authors skip batches that are not full. Here the similarities to
    missing images are zero; full batches are treated as in the authors' code.
    """
    stages, teacher_stages = spec.student_features.stages, spec.teacher_features.stages
    terms: Terms = {
        "soft_targets": (kl, soft_targets(temperature)),
        "calibration": (weight, Calibration(stages, teacher_stages, batch)),
    }
    return labels() + Method(terms, hooked(*stages), hooked(*teacher_stages))


class Calibration(nn.Module):
    """A term: squared distances between each stage of the student and each stage of the teacher, weighted by attention
    and averaged over images and stages of the student.

    Args:
        stages, teacher_stages: the maps of student and teacher.
        batch: the largest number of images in a batch.
    """

    def __init__(self, stages: Sequence[Feature], teacher_stages: Sequence[Feature], batch: int) -> None:
        super().__init__()
        self.names = [[stage.path for stage in both] for both in (stages, teacher_stages)]
        self.batch = batch
        self.queries = nn.ModuleList(embedding(batch) for _ in stages)
        self.keys = nn.ModuleList(embedding(batch) for _ in teacher_stages)
        self.projections = nn.ModuleList(
            nn.ModuleList(projection(student.width, teacher.width) for teacher in teacher_stages) for student in stages
        )

    def forward(self, student: Outputs, teacher: Outputs | None, labels: Tensor | None) -> Tensor:
        assert student.features and teacher and teacher.features, "calibration needs a teacher's features"
        names, teacher_names = self.names
        maps, teacher_maps = [student.features[n] for n in names], [teacher.features[n] for n in teacher_names]
        return attended_mean(self._distances(maps, teacher_maps), self.attention(maps, teacher_maps))

    def attention(self, maps: list[Tensor], teacher_maps: list[Tensor]) -> Tensor:
        """Attention (batch, stages, teacher's stages), in fp32; each row sums to 1."""
        with torch.autocast(maps[0].device.type, enabled=False):
            queries = [unit(embed(self._similarities(x))) for embed, x in zip(self.queries, maps, strict=True)]
            keys = [unit(embed(self._similarities(x))) for embed, x in zip(self.keys, teacher_maps, strict=True)]
            return stage_attention(torch.stack(queries, dim=1), torch.stack(keys, dim=1))

    def _similarities(self, maps: Tensor) -> Tensor:
        """Scalar products of the maps of all images (batch, self.batch), padded with zeros."""
        missing = self.batch - len(maps)
        if missing < 0:
            raise UserError(
                f"semckd was built for batches of {self.batch}, this one has {len(maps)} images: pass --method "
                f"semckd:batch={len(maps)}"
            )
        flat = rearrange(maps, "batch ... -> batch (...)")
        return F.pad(product(flat, flat.T), (0, missing))

    def _distances(self, maps: list[Tensor], teacher_maps: list[Tensor]) -> Tensor:
        """Mean squared differences (batch, stages, teacher's stages). The larger of two maps is averaged down."""
        rows = []
        for student, projections in zip(maps, self.projections, strict=True):
            assert isinstance(projections, nn.ModuleList)
            pairs = zip(teacher_maps, projections, strict=True)
            rows.append(torch.stack([squared_distance(student, teacher, p) for teacher, p in pairs], dim=1))
        return torch.stack(rows, dim=1)


def squared_distance(student: Tensor, teacher: Tensor, projection: nn.Module) -> Tensor:
    """Mean squared difference (batch,) between the student's projected map and the teacher's map."""
    size = min(student.shape[-1], teacher.shape[-1])
    projected = projection(average_down(student, size)).float()
    squares = (projected - average_down(teacher.detach(), size).float()).square()
    return reduce(squares, "batch channels height width -> batch", "mean")


def embedding(batch: int) -> nn.Module:
    """Maps similarities (batch, batch) to (batch, batch / 4)."""
    width = max(1, batch // 4)
    return nn.Sequential(nn.Linear(batch, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))


def projection(channels: int, teacher_channels: int) -> nn.Module:
    """Convolutions of 1x1, 3x3 and 1x1 to a teacher's channels; their output may be negative."""
    return nn.Sequential(
        conv_norm(channels, 2 * teacher_channels, kernel=1),
        conv_norm(2 * teacher_channels, 2 * teacher_channels),
        nn.Conv2d(2 * teacher_channels, teacher_channels, 1, bias=False),
    )
