"""Teacher, student, data and method of `distill`, in the form that the run, the trainer and the methods take."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.utils.data import Subset
from transformers import PreTrainedModel

from kd.common import losses
from kd.common.data.sources import labelled
from kd.common.distillation.adapters import TEACHER, Collator, NamedOutputs, Rows, restored
from kd.common.distillation.row_labels import as_classes
from kd.common.methods import (
    METHODS,
    Feature,
    Method,
    ModelFeatures,
    TaskSpec,
    labels_and_soft_targets,
    match,
    parse_method,
    some_of_each_class,
)
from kd.common.methods.classification import RELATION_METHODS
from kd.common.objective import task_loss
from kd.common.outputs import FeatureHooks, Outputs
from kd.common.training.inference import run_inference
from kd.common.utils.devices import best_device
from kd.common.utils.errors import UserError
from kd.common.utils.ranges import Positive, Share
from kd.common.utils.tasks import TaskType

Shapes = dict[str, torch.Size]  # of the outputs of submodules, by path


def regression_kd(spec: TaskSpec, *, alpha: Share = 0.1) -> Method:
    """alpha * labels + (1 - alpha) * mean squared difference to the teacher's predictions."""
    return labels_and_soft_targets(alpha, 1.0, "regression")


def multi_label_kd(spec: TaskSpec, *, alpha: Share = 0.1, temperature: Positive = 4.0) -> Method:
    """alpha * labels + (1 - alpha) * soft targets of each label (`losses.binary_soft_target_kl`)."""
    return labels_and_soft_targets(alpha, temperature, "multi_label")


METHODS_OF: dict[TaskType, Mapping[str, Callable[..., Method]]] = {
    "classification": METHODS,
    "regression": {"kd": regression_kd} | RELATION_METHODS,
    "multi_label": {"kd": multi_label_kd} | RELATION_METHODS,
}
TOKENS = "input_ids"
FEATURE_METHODS = {*RELATION_METHODS, "wkd"}


class Task:
    """Runs teacher and student on two rows and raises UserError if they do not fit together.

    Attributes:
        data: By split: "train" and, mostly, "validation".
        classes: Number of logits of both models.
        is_transformers: Whether the student is a transformers model.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module | Callable[[], nn.Module],
        data: dict[str, Rows],
        method: str | Method,
        features: Mapping[str, str],
        feature_weight: float,
    ) -> None:
        self.data, self.method, self.matched, self.feature_weight = data, method, dict(features), feature_weight
        self.columns = data["train"].inputs
        self.teacher = NamedOutputs(teacher, self.columns, is_teacher=True)
        self.make_student = (lambda: student) if isinstance(student, nn.Module) else student
        untrained = self.new_student()
        self.is_transformers = isinstance(untrained.module, PreTrainedModel)
        self.pretrained = {"teacher": teacher} | ({"student": student} if isinstance(student, nn.Module) else {})
        inputs = [name for name in self.columns if name in {*self.teacher.columns, *untrained.columns}]
        other_tokens = TOKENS in untrained.columns and TOKENS not in self.teacher.columns
        if other_tokens and (self.matched or (isinstance(method, str) and method.split(":")[0] in FEATURE_METHODS)):
            raise UserError("teacher and student read other tokens, so only logits are compared: pass no features")
        padding = {
            TOKENS: _padding(untrained.module if other_tokens else teacher),
            TEACHER + TOKENS: _padding(teacher),
        }
        self.collate = Collator([*inputs, *(["labels"] if self.labelled else []), "sample_id"], padding)
        rows = data["train"]
        self.sample = Collator(inputs, padding)([rows[i] for i in range(min(2, len(rows)))])
        self.classes, self.teacher_shapes = self._probe(self.teacher, list(self.matched.values()))
        classes, self.student_shapes = self._probe(untrained, list(self.matched))
        if classes != self.classes:
            raise UserError(f"the student returns {classes} logits and the teacher {self.classes}: make them equal")
        self._check_labels()
        self.new_method()  # raises UserError

    @property
    def origins(self) -> list[str]:
        """The names or folders from which transformers loaded student and teacher, as of `Card`."""
        models = [self.pretrained.get("student"), self.pretrained["teacher"]]
        return [model.name_or_path for model in models if isinstance(model, PreTrainedModel) and model.name_or_path]

    # ---- data ----

    @property
    def labelled(self) -> bool:
        """Whether training rows have labels."""
        return self.data["train"].labels is not None

    @property
    def type(self) -> TaskType:
        """Several labels per row are floats (rows, classes)."""
        labels = self.data["train"].labels
        if labels is not None and labels.ndim == 2:
            return "multi_label"
        return "regression" if self.classes == 1 else "classification"

    @property
    def labels_by_split(self) -> dict[str, np.ndarray]:
        return {split: rows.labels for split, rows in self.data.items() if rows.labels is not None}

    @property
    def sizes(self) -> dict[str, int | None]:
        return {s: len(self.data[s]) if s in self.data else None for s in ("train", "validation", "test")}

    def _check_labels(self) -> None:
        for rows in self.data.values():
            if rows.labels is not None and self.type == "classification":
                rows.labels = as_classes(rows.labels)
        for split, labels in self.labels_by_split.items():
            if self.type == "multi_label":
                if labels.shape[1:] != (self.classes,) or not np.isin(labels[labelled(labels)], (0, 1)).all():
                    raise UserError(
                        f"the {split} labels are {labels.shape[-1]} numbers from {labels.min():g} to "
                        f"{labels.max():g}, and the models return {self.classes} logits: use 0 or 1 for each of them"
                    )
                continue
            if (self.type == "regression") != (labels.dtype.kind == "f"):
                raise UserError(
                    f"the {split} labels are {labels.dtype}, and the models return {self.classes} logits: pass "
                    "integers as classes, or floats with one logit for regression"
                )
            if self.type == "classification" and labels.max() >= self.classes:
                raise UserError(
                    f"the {split} labels are up to {labels.max()}, and the models return {self.classes} logits: use 0 "
                    f"to {self.classes - 1}"
                )
        if self.labelled and len(self.labels_by_split) < len(self.data):
            raise UserError("the validation data have no labels: add them, or leave `validation` out")

    def leave_out_unlabelled(self) -> list[str]:
        """Leaves out validation rows without a label. Returns notes on rows without a label."""
        fates = {"train": "train the student by the teacher's outputs alone", "validation": "are left out"}
        notes = []
        for split, fate in fates.items():
            rows = self.data.get(split)
            if rows is None or rows.labels is None or (missing := int((~rows.is_labelled).sum())) == 0:
                continue
            notes.append(f"{missing} of {len(rows)} rows of {split} have no label and {fate}.")
            if split == "validation":
                self.data[split] = rows.labelled_part()
        return notes

    # ---- models ----

    def new_student(self) -> NamedOutputs:
        """A copy, also of what a function creates, because that may share modules with the teacher."""
        return NamedOutputs(copy.deepcopy(self.make_student()), self.columns)

    def load(self, folder: str | Path) -> NamedOutputs:
        return self.new_student().load(folder)

    @torch.no_grad()
    def _probe(self, model: NamedOutputs, paths: list[str]) -> tuple[int, Shapes]:
        """The number of logits of a model, and the shapes of the outputs of its submodules."""
        try:
            hooks = FeatureHooks(model.module, {path: path for path in paths})
        except ValueError as error:
            raise UserError(f"{error}: choose paths of its named_modules()") from error
        try:
            with restored(model):
                logits = model.to(best_device()).eval()(**on_device(self.sample)).logits
            outputs = hooks.take()
        finally:
            hooks.remove()
        for path in paths:
            if not isinstance(outputs.get(path), Tensor) or outputs[path].dim() not in (2, 3, 4):
                raise UserError(f"submodule {path} outputs no vectors, hidden states or maps: choose another")
        return logits.shape[1], {path: outputs[path].shape for path in paths}

    # ---- method ----

    @property
    def method_name(self) -> str:
        return self.method if isinstance(self.method, str) else " + ".join(self.method.terms)

    def new_method(self) -> Method:
        """The method with new auxiliary parameters and the matched features, for the labels that the data have.

        Raises UserError if it needs the label of every row and some have none.
        """
        if isinstance(self.method, Method):
            method, matches = copy.deepcopy(self.method), True
        else:
            name = self.method.split(":")[0]
            matches = name not in FEATURE_METHODS
            if not matches and not self.matched:
                raise UserError(f'method {name} compares features: pass them, as in features={{"layer2": "layer4"}}')
            method = parse_method(self.method, METHODS_OF[self.type])(self._spec())
            if "task" in method.terms:
                method.terms["task"] = method.terms["task"][0], task_loss(self.type)
        for paths in self.matched.items() if matches else ():
            method += self._match(*paths)
        labels = self.data["train"].labels
        if labels is None:
            method.terms.pop("task", None)
            return method
        if not labelled(labels).all() and method.label_terms:
            raise UserError(
                f"{' and '.join(method.label_terms)} of {self.method_name} needs the label of every training row, and "
                'some have none: pass method="kd", or leave these rows out'
            )
        return method.for_labels(torch.from_numpy(labels))

    def _match(self, student: str, teacher: str) -> Method:
        """The squared difference of two features, through a linear projector where widths differ (arXiv:1412.6550)."""
        features = self._features("student", student), self._features("teacher", teacher)
        widths = features[0].width, features[1].width
        projector: nn.Module | None = None
        if widths[0] != widths[1]:
            projector = nn.Conv2d(*widths, 1) if features[0].size else nn.Linear(*widths)
        shapes = self.student_shapes[student], self.teacher_shapes[teacher]
        transform = None if len(shapes[0]) == 3 else _unmasked
        name = f"features_{student.replace('.', '_')}"
        method = match(name, self.feature_weight, *features, losses.feature_l2, projector, transform)
        first, second = Outputs(features={student: torch.zeros(shapes[0])}), torch.zeros(shapes[1])
        try:
            method.terms[name][1](first, Outputs(features={teacher: second}), None)
        except (ValueError, RuntimeError):
            kinds = f"{student} {tuple(shapes[0])} cannot match {teacher} {tuple(shapes[1])}"
            raise UserError(f"{kinds}: choose features of one kind") from None
        return method

    def _features(self, model: str, path: str) -> Feature:
        shape = (self.student_shapes if model == "student" else self.teacher_shapes)[path]
        return Feature(path, *((shape[1], shape[-1]) if len(shape) == 4 else (shape[-1],)))

    def _spec(self) -> TaskSpec:
        def features_of(model: Any) -> ModelFeatures:
            paths = self.matched if model == "student" else self.matched.values()
            stages = [self._features(model, path) for path in paths]
            return ModelFeatures(stages=stages, head=stages[-1], last=stages[-1])

        labels = self.data["train"].labels
        return TaskSpec(
            classes=self.classes,
            student="student",
            teacher="teacher",
            features_of=features_of,
            pool=_pool,
            flatten=_flatten,
            labels=torch.as_tensor(np.zeros(0, dtype=int) if labels is None else labels),
            teacher_samples=self._teacher_samples,
        )

    def _teacher_samples(self) -> tuple[Tensor, Tensor]:
        """Pooled features (samples, width) of the teacher and labels (samples,) of some training samples."""
        spec, path = self._spec(), [*self.matched.values()][-1]
        rows = some_of_each_class(spec.labels, self.classes)
        hooks = FeatureHooks(self.teacher, self.hooks({"feature": path}))

        def call(**batch: Tensor) -> dict[str, Tensor]:
            self.teacher(**batch)
            return {"feature": _pool(hooks.take()["feature"], batch.get("attention_mask"))}

        outputs = run_inference(self.teacher, call, Subset(self.data["train"], rows.tolist()), self.collate)
        hooks.remove()
        return torch.stack(outputs["feature"]), spec.labels[rows]

    def hooks(self, paths: dict[str, str]) -> dict[str, str]:
        """{name: path inside NamedOutputs}."""
        return {name: f"module.{path}" for name, path in paths.items()}


def _padding(model: nn.Module) -> int:
    return getattr(getattr(model, "config", None), "pad_token_id", None) or 0


def on_device(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(best_device()) for name, value in batch.items()}


def _unmasked(feature: Tensor, mask: Tensor | None) -> Tensor:
    return feature


def _pool(feature: Tensor, mask: Tensor | None) -> Tensor:
    """Maps (batch, width, size, size) or hidden states (batch, positions, width) -> (batch, width)."""
    if feature.dim() == 4:
        return reduce(feature, "batch width height columns -> batch width", "mean")
    if feature.dim() == 3 and mask is not None:
        kept = mask.unsqueeze(-1).to(feature.dtype)
        return (feature * kept).sum(1) / kept.sum(1)
    return reduce(feature, "batch ... width -> batch width", "mean")


def _flatten(feature: Tensor, mask: Tensor | None) -> Tensor:
    """Maps -> (batch, width * size * size); hidden states are pooled, since their number differs by batch."""
    return rearrange(feature, "batch ... -> batch (...)") if feature.dim() == 4 else _pool(feature, mask)
