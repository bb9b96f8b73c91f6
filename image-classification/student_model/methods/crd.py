"""Contrastive representation distillation: features of one image are alike, features of two images are not."""

import math

import torch
from accelerate.utils import gather
from einops import pack
from torch import Tensor, nn

from kd.common.losses import noise_contrastive
from kd.common.losses.shared import product, unit
from kd.common.methods import Feature, Method, TaskSpec, hooked, labels
from kd.common.outputs import Outputs
from kd.common.utils.devices import process
from kd.common.utils.errors import UserError
from kd.common.utils.ranges import Positive, ShareBelow1
from kd.image_classification.student_model.matching import pooled

FIRST_DRAW = 2**30  # the first draw has a number below this; a CPU's generator looks at 32 bits of its seed


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

    Embeddings of both networks' pooled features, trained with the student, become alike for one image and unlike for
    `negatives` images of other classes (or as many as there are). The embeddings of these come from earlier batches:
    two memories of `width` numbers for each training image, which are checkpointed and never ship. They start as
    random vectors of length 1, where the authors' are of about that length.
    """
    student, teacher = spec.student_features.head, spec.teacher_features.head
    contrast = Contrast(student, teacher, spec.labels, negatives, width, temperature, momentum)
    return labels() + Method({"contrast": (weight, contrast)}, hooked(student), hooked(teacher))


class Contrast(nn.Module):
    """A term: `losses.noise_contrastive` of the student's embeddings among the teacher's remembered ones, plus that of
    the teacher's among the student's.

    P = exp(cosine / temperature) / Z, where Z, one for each of the two, makes P one over the number of samples on
    average in the first batch, and stays.

    On several processes each draws its negatives, and all keep the embeddings of all in memory. As with any buffers,
    data parallelism sends those of the first process to the others with every step.

    Args:
        student, teacher: the maps whose averages are embedded.
        labels: (samples,) the class of each training image, by its `sample_id`.
        negatives: for each image; at most as many as there are of other classes, for every class.
        width: of the embeddings.
        momentum: the share of an embedding in memory that stays when its image occurs again.
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
        most = len(labels) - int(labels.bincount().max())
        if not most:
            raise UserError("crd contrasts images of different classes, and all training images are of one")
        self.negatives, self.temperature, self.momentum = min(negatives, most), temperature, momentum
        self.student_path, self.teacher_path = student.path, teacher.path
        self.student_embedding, self.teacher_embedding = (nn.Linear(f.width, width) for f in (student, teacher))
        for name in ("student_memory", "teacher_memory"):
            self.register_buffer(name, unit(torch.randn(len(labels), width)))
        self.register_buffer("log_z", torch.full((2,), math.nan))  # until the first batch
        self.register_buffer("labels", labels, persistent=False)
        self.draw = int(torch.randint(FIRST_DRAW, ()))

    def get_extra_state(self) -> Tensor:
        """The number of the next draw, which as a buffer would lie on the GPU: reading it would wait for all else."""
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
        loss = self._among(embeddings, self.teacher_memory, rows, 0)
        loss = loss + self._among(teacher_embeddings, self.student_memory, rows, 1)
        remember(self.student_memory, ids, embeddings, self.momentum)
        remember(self.teacher_memory, ids, teacher_embeddings, self.momentum)
        return loss

    def draw_negatives(self, ids: Tensor) -> Tensor:
        """Samples of other classes (batch, negatives) for each of `ids` (batch,), none of them twice in a row.

        Which they are depends on the number of the draw alone, so that a resumed training goes on as it would have.
        """
        rank, processes = process()
        generator = torch.Generator(ids.device).manual_seed(self.draw * processes + rank)
        self.draw += 1
        order = torch.rand(len(ids), len(self.labels), device=ids.device, generator=generator)
        order.masked_fill_(self.labels == self.labels[ids, None], -1.0)
        return order.topk(self.negatives, dim=1, sorted=False).indices

    def _among(self, embeddings: Tensor, memory: Tensor, rows: Tensor, direction: int) -> Tensor:
        """The loss of embeddings (batch, width) where the memory's `rows` (batch, 1 + negatives) are asked for."""
        memory = memory.clone()  # the backward pass needs it as it is now
        # The product with all of it is much faster than fetching each image's rows.
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
    """Moves rows `ids` (batch,) of a memory towards embeddings (batch, width), in place, and back to length 1.

    The embeddings of all processes are stored. Of an image that occurs twice, the first embedding is.
    """
    ids, embeddings = gather(ids), gather(embeddings.detach())
    moved = unit(momentum * memory[ids] + (1 - momentum) * embeddings)
    first = (ids == ids[:, None]).int().argmax(1)
    memory[ids] = moved[first]
