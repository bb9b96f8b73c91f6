"""A student and its teacher, as methods see them."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.utils.data import Subset

from kd.common.methods import TaskSpec, some_of_each_class
from kd.common.objective import FeatureLoss, Term
from kd.common.outputs import Outputs
from kd.common.training.inference import identity_collate, run_inference
from kd.common.utils.devices import best_device
from kd.common.utils.errors import UserError
from kd.image_classification.data.loading import ImageData
from kd.image_classification.student_model.matching import (
    MapShape,
    hooked,
    last_stage,
    probe,
    some_images,
    stage_paths,
)
from kd.image_classification.teacher_model.classifier import ImageClassifier


@dataclass(frozen=True)
class Pair:
    """Student and teacher before training, and the images that both will see, in so many views of each in a batch."""

    student: ImageClassifier
    teacher: ImageClassifier
    data: ImageData
    views: int = 1

    @cached_property
    def images(self) -> Tensor:
        return some_images(self.data)

    def shapes(self, own: list[str], target: list[str]) -> tuple[dict[str, MapShape], dict[str, MapShape]]:
        """{path: shape} of the student's and the teacher's maps at these submodules, with their last ones (`map`)."""
        return probe(self.student, own, self.images), probe(self.teacher, target, self.images)

    def stages(self) -> tuple[list[str], list[str]]:
        """The paths of both networks' stages, of which there have to be as many."""
        own, target = stage_paths(self.student), stage_paths(self.teacher)
        if len(own) != len(target):
            raise UserError(
                f"this method pairs stages one by one, but {self.student.config.architecture} has {len(own)} and "
                f"{self.teacher.config.architecture} {len(target)}: choose networks with as many stages"
            )
        return own, target

    @property
    def last_stages(self) -> tuple[str, str]:
        """The student's and the teacher's feature that the toolboxes call the last map."""
        return last_stage(self.student), last_stage(self.teacher)

    @cached_property
    def task(self) -> TaskSpec:
        own, target = self.shapes([], [])
        return TaskSpec(
            classes=len(self.data.label_names),
            student_width=own["map"].channels,
            teacher_width=target["map"].channels,
            pooled=lambda loss: match_flat("pooled", "pooled", loss),
            last=lambda loss: match_flat(*self.last_stages, loss),
            teacher_samples=self._teacher_samples,
            features=hooked(self.student, "map", self.last_stages[0]),
            teacher_features=hooked(self.teacher, "map", self.last_stages[1]),
            views=self.views,
        )

    def _teacher_samples(self) -> tuple[Tensor, Tensor]:
        """Of some training images of each class, as they are."""
        labels = self.data.splits["train"].labels
        rows = some_of_each_class(labels, len(self.data.label_names))

        def pooled(**batch: Tensor) -> dict[str, Tensor]:
            return {"pooled": self.teacher(**batch).features["pooled"].float()}

        images = Subset(self.data.views("train", best_device()), rows.tolist())
        said = run_inference(self.teacher, pooled, images, identity_collate, batch_size=250)
        return torch.stack(said["pooled"]), labels[rows]


def match_flat(name: str, teacher_name: str, loss: FeatureLoss) -> Term:
    """A loss between a feature of the student and one of the teacher, flattened to (batch, anything)."""

    def term(student: Outputs, teacher: Outputs | None, labels: Tensor | None) -> Tensor:
        assert student.features and teacher and teacher.features, "feature matching needs a teacher's features"
        return loss(student.features[name].flatten(1), teacher.features[teacher_name].flatten(1))

    return term
