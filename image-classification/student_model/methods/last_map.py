"""Methods that match the last map, its average over positions, or its contribution to the logits.

A linear head that a method uses is part of its network, not of the objective. The teacher's head is frozen and not
saved with the auxiliary parameters. The student's head is trained and saved with the student.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from accelerate.utils import gather
from einops import pack, rearrange, repeat
from torch import Tensor, nn

from kd.common.losses import feature_l2, noise_contrastive
from kd.common.losses.shared import product, unit
from kd.common.methods import Feature, Method, TaskSpec, hooked, labels, match, unlabelled_error
from kd.common.objective import Weight, is_labelled
from kd.common.outputs import Outputs
from kd.common.utils.devices import process
from kd.common.utils.errors import UserError
from kd.common.utils.ranges import Positive, ShareBelow1
from kd.image_classification.student_model.matching import pooled
from kd.image_classification.student_model.methods.stages import regressor
from kd.image_classification.teacher_model.classifier import ImageClassifier

PHASES = (
    (10 / 240, 0.1),
    (20 / 240, 0.5),
    (180 / 240, 1.0),
    (210 / 240, 0.5),
    (1.0, 0.1),
)  # (until, share)
FIRST_DRAW = 2**30  # bound on the number of the first draw; CPU generators use 32 bits of a seed


def srrl(spec: TaskSpec, *, weight: float = 1.0) -> Method:
    """Pooled features, and the logits of the teacher's head for them (Yang et al., Knowledge distillation via softmax
    regression representation learning, ICLR 2021), plus the labels' cross-entropy. The teacher needs a linear head.

    This is the loss of the authors' code, which is for ImageNet. The README quotes a figure of SimKD's toolbox for
    CIFAR-100, which adds soft targets with weight 1 at a temperature of 4. The regressor ends in a ReLU only if the
    teacher's map follows one, as in all networks of that toolbox.
    """
    student, teacher = spec.student_features.head, spec.teacher_features.head
    term = SoftmaxRegression(student.path, teacher.path, regressor(student, teacher), linear_head(spec.teacher))
    return labels() + Method({"regression": (weight, term)}, hooked(student), hooked(teacher))


def catkd(spec: TaskSpec, *, weight: float = 15.0, size: int = 2, normalized: bool = False) -> Method:
    """Class activation maps, averaged down to `size` pixels (CAT-KD, Guo et al., arXiv:2304.12777), plus the labels'
    cross-entropy. `normalized` scales the map of each class to length 1, as the authors do for some pairs.

    The authors choose all three arguments by pair, because the loss grows with the logits. The defaults are those of
    ResNet32x4 -> ResNet8x4. Both networks need linear heads. These have a bias here, but not in the authors' code.
    """
    loss = ClassActivations(linear_head(spec.student), linear_head(spec.teacher), size, normalized)
    return labels() + match("class_maps", weight, spec.student_features.head, spec.teacher_features.head, loss)


def norm(spec: TaskSpec, *, copies: int = 8, alpha: float = 0.1, weight: float = 1.0) -> Method:
    """N-to-one representations (NORM, Liu et al., arXiv:2305.13803): alpha * labels + weight * n_to_one. The weight
    follows the phases of the authors' code.

    A 1x1 convolution with batch norm expands the student's last map to `copies` times the teacher's channels. Each
    copy has to match the teacher's map. In the paper, a second convolution contracts the output, its sum with the map
    is the input of the student's head, and both layers are folded into the head after training. This contraction is
    left out here: the labels train the saved student, and the expansion is a regressor. Two more differences from
    the authors' code: the labels' loss takes logits that are not standardized, and a larger map of the teacher is
    averaged down instead of max-pooled. The published figures are the best of four values of alpha, 0.0625 to 0.5.

    As in the authors' networks, both maps are those of the last stage, except that a MobileNetV2 or ShuffleNetV2
    student uses the map after its last 1x1 convolution.
    """
    has_expansion = spec.student.backbone.last is not None
    student = spec.student_features.head if has_expansion else spec.student_features.last
    teacher = spec.teacher_features.last
    expanded = replace(teacher, width=copies * teacher.width, positive=False)
    return labels(alpha) + match(
        "representations", in_phases(weight), student, teacher, n_to_one, regressor(student, expanded)
    )


def linear_head(model: ImageClassifier) -> nn.Linear:
    """The head of a classifier. Raises UserError if it is not a linear function of the average map."""
    if model.config.pool > 1:
        raise UserError(
            f"this method needs a head on the average of the last map, but that of {model.config.architecture} reads "
            f"averages of {model.config.pool}x{model.config.pool} parts: choose another --method"
        )
    if not isinstance(model.head, nn.Linear):
        raise UserError(
            f"this method needs a linear head, but {model.config.architecture} has a {type(model.head).__name__}: "
            "choose another teacher"
        )
    return model.head


class SoftmaxRegression(nn.Module):
    """MSE(g(h_s), h_t) + MSE(teacher's head of g(h_s), teacher's logits), h being pooled features (batch, channels).

    Args:
        student, teacher: the features whose averages are the inputs of the heads.
        regressor: g, from maps with the student's channels to maps with the teacher's.
        head: the head of the teacher; the term uses copies of its parameters, which are neither trained nor saved.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, student: str, teacher: str, regressor: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.student, self.teacher, self.regressor = student, teacher, regressor
        self.register_buffer("weight", head.weight.detach().clone(), persistent=False)
        self.register_buffer("bias", head.bias.detach().clone(), persistent=False)

    def forward(self, student: Outputs, teacher: Outputs | None, labels: Tensor | None) -> Tensor:
        assert student.features and teacher and teacher.features and teacher.logits is not None
        features = rearrange(pooled(student.features[self.student]), "batch channels -> batch channels 1 1")
        mapped = rearrange(self.regressor(features), "batch channels 1 1 -> batch channels")
        logits = F.linear(mapped, self.weight, self.bias)
        return feature_l2(mapped, pooled(teacher.features[self.teacher])) + feature_l2(logits, teacher.logits)


class ClassActivations(nn.Module):
    """Mean squared difference of class activation maps: the contribution of each position of the last map to the
    logits.

    Args:
        student_head: the head inside the student, which gets gradients from this loss.
        teacher_head: the loss uses a copy of its weight, which is neither trained nor saved.
        size: larger maps are averaged down to this size.
        normalized: scales the map of each class to length 1 after that.
    """

    teacher_weight: Tensor
    reads_student = True  # reads the student's weights, which --fsdp shards

    def __init__(self, student_head: nn.Linear, teacher_head: nn.Linear, size: int, normalized: bool = False) -> None:
        super().__init__()
        self.student_head = (student_head,)  # a tuple, so that it does not become a submodule of the objective
        self.register_buffer("teacher_weight", teacher_head.weight.detach().clone(), persistent=False)
        self.size, self.normalized = size, normalized

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        size = min(self.size, student.shape[-1])
        maps = class_maps(student, self.student_head[0].weight, size)
        teacher_maps = class_maps(teacher, self.teacher_weight, size)
        if self.normalized:
            maps, teacher_maps = unit(maps), unit(teacher_maps)
        return feature_l2(maps, teacher_maps, mask)


def class_maps(features: Tensor, weight: Tensor, size: int) -> Tensor:
    """Class activation maps (batch, classes, size * size) of last maps (batch, channels, height, width) and the weight
    (classes, channels) of a head. Their mean over all positions is the logits without the bias.
    """
    positions = F.adaptive_avg_pool2d(features.float(), size)
    return product(weight, rearrange(positions, "batch channels height width -> batch channels (height width)"))


def n_to_one(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Splits the channels of the student's map (batch, N * channels, height, width) into N parts and sums their mean
    squared differences from the teacher's map (batch, channels, height, width). `mask` (batch,) selects samples.
    """
    copies = student.shape[1] // teacher.shape[1]
    teacher = repeat(teacher, "batch channels ... -> batch (copies channels) ...", copies=copies)
    return copies * feature_l2(student, teacher, mask)


def in_phases(weight: float) -> Weight:
    """A weight scaled by the share of each of PHASES; zero stays zero."""
    if weight == 0:
        return 0.0
    return lambda progress: weight * next((share for until, share in PHASES if progress < until), PHASES[-1][1])


# ---- contrastive representation distillation ----


def crd(
    spec: TaskSpec,
    *,
    weight: float = 0.8,
    negatives: int = 16384,
    width: int = 128,
    temperature: Positive = 0.07,
    momentum: ShareBelow1 = 0.5,
) -> Method:
    """Contrastive representation distillation (CRD, Tian et al., arXiv:1910.10699), plus the labels.

    Trained embeddings of both networks' pooled features become similar for the same image, and dissimilar for
    `negatives` images of other classes (at most as many as exist). The embeddings of the negatives are from earlier
    batches. They are stored in two memory banks of `width` numbers per training image, which are checkpointed but not
    part of the student. The banks start as random vectors of length 1; the authors' have about that length.
    """
    student, teacher = spec.student_features.head, spec.teacher_features.head
    contrast = Contrast(student, teacher, spec.labels, negatives, width, temperature, momentum)
    return labels() + Method({"contrast": (weight, contrast)}, hooked(student), hooked(teacher))


class Contrast(nn.Module):
    """A term: `losses.noise_contrastive` of the student's embeddings with the teacher's memory bank, plus that of the
    teacher's embeddings with the student's memory bank.

    P = exp(cosine / temperature) / Z. The constant Z, one for each direction, is set in the first batch, so that P is
    on average one over the number of samples.

    In a distributed run, each process draws negatives for its images, and all processes store the embeddings of all
    images. Data parallelism broadcasts the memory banks of the first process in every step, as it does any buffer.

    Args:
        student, teacher: the maps whose averages are embedded.
        labels: (samples,) the classes of the training images, indexed by `sample_id`.
        negatives: number of negatives for each image, bounded by the number of images of other classes.
        width: width of the embeddings.
        momentum: share of a stored embedding that remains when its image occurs again.
    """

    student_memory: Tensor
    teacher_memory: Tensor
    log_z: Tensor
    labels: Tensor

    def __init__(
        self,
        student: Feature,
        teacher: Feature,
        labels: Tensor,
        negatives: int,
        width: int,
        temperature: float,
        momentum: float,
    ) -> None:
        super().__init__()
        if not is_labelled(labels).all():
            raise UserError(unlabelled_error("--method crd", ["contrast"]))
        most = len(labels) - int(labels.bincount().max())
        if not most:
            raise UserError("method crd needs training images of at least 2 classes: choose another method")
        self.negatives, self.temperature, self.momentum = min(negatives, most), temperature, momentum
        self.student_path, self.teacher_path = student.path, teacher.path
        self.student_embedding, self.teacher_embedding = (nn.Linear(f.width, width) for f in (student, teacher))
        for name in ("student_memory", "teacher_memory"):
            self.register_buffer(name, unit(torch.randn(len(labels), width)))
        self.register_buffer("log_z", torch.full((2,), math.nan))  # until the first batch
        self.register_buffer("labels", labels, persistent=False)
        self.draw = int(torch.randint(FIRST_DRAW, ()))

    def get_extra_state(self) -> Tensor:
        """The number of the next draw. It is not a buffer, because reading it from a GPU would synchronize."""
        return torch.tensor(self.draw)

    def set_extra_state(self, state: Tensor) -> None:
        self.draw = int(state)

    def forward(self, student: Outputs, teacher: Outputs | None, labels: Tensor | None) -> Tensor:
        assert student.features and teacher and teacher.features, "contrast needs a teacher's features"
        ids = student.sample_id
        if ids is None:
            raise ValueError("crd needs a `sample_id` column in the training data")
        embeddings = embedded(self.student_embedding, student.features[self.student_path])
        teacher_embeddings = embedded(self.teacher_embedding, teacher.features[self.teacher_path])
        rows, _ = pack([ids, self.draw_negatives(ids)], "batch *")  # (batch, 1 + negatives)
        loss = self._contrast(embeddings, self.teacher_memory, rows, 0)
        loss = loss + self._contrast(teacher_embeddings, self.student_memory, rows, 1)
        remember(self.student_memory, ids, embeddings, self.momentum)
        remember(self.teacher_memory, ids, teacher_embeddings, self.momentum)
        return loss

    def draw_negatives(self, ids: Tensor) -> Tensor:
        """Draws ids (batch, negatives) of samples of other classes for `ids` (batch,), without repetition in a row.

        They depend only on the number of the draw, so that a resumed training draws the same.
        """
        rank, processes = process()
        generator = torch.Generator(ids.device).manual_seed(self.draw * processes + rank)
        self.draw += 1
        order = torch.rand(len(ids), len(self.labels), device=ids.device, generator=generator)
        order.masked_fill_(self.labels == self.labels[ids, None], -1.0)
        return order.topk(self.negatives, dim=1, sorted=False).indices

    def _contrast(self, embeddings: Tensor, memory: Tensor, rows: Tensor, direction: int) -> Tensor:
        """The loss of embeddings (batch, width) with the `rows` (batch, 1 + negatives) of a memory bank."""
        memory = memory.clone()  # `remember` changes it before the backward pass
        # The product with the whole bank is much faster than gathering the rows of each image.
        scores = product(embeddings, memory.T).gather(1, rows) / self.temperature
        log_mean = scores.detach().logsumexp((0, 1)) - math.log(scores.numel())
        known = self.log_z[direction]
        self.log_z[direction] = torch.where(known.isnan(), log_mean + math.log(len(memory)), known)
        return noise_contrastive(scores - self.log_z[direction], len(memory))


def embedded(linear: nn.Module, maps: Tensor) -> Tensor:
    """Unit vectors (batch, width) of the averages of maps (batch, channels, height, width), in fp32."""
    with torch.autocast(maps.device.type, enabled=False):
        return unit(linear(pooled(maps)))


@torch.no_grad()
def remember(memory: Tensor, ids: Tensor, embeddings: Tensor, momentum: float) -> None:
    """Updates rows `ids` (batch,) of a memory bank in place: the moving average with embeddings (batch, width), at
    length 1. The embeddings of all processes are stored. If an image occurs twice, the first embedding is used.
    """
    ids, embeddings = gather(ids), gather(embeddings.detach())
    moved = unit(momentum * memory[ids] + (1 - momentum) * embeddings)
    first = (ids == ids[:, None]).int().argmax(1)
    memory[ids] = moved[first]
