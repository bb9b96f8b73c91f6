"""Distillation in three lines, for any models and data:

    from kd.common import distill

    result = distill(teacher, student, train, validation)
    print(result)

A thin layer over the run and the trainer that the scripts use.
"""

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import reduce
from torch import Tensor, nn
from torch.utils.data import Subset
from transformers import PreTrainedModel

from kd.common import losses
from kd.common.adapters import WEIGHTS, Collator, NamedOutputs, Rows, accepted, restored
from kd.common.data.fingerprints import data_fingerprint
from kd.common.data.sources import holdout
from kd.common.methods import (
    METHODS,
    Feature,
    Method,
    ModelFeatures,
    TaskSpec,
    labels,
    labels_and_soft_targets,
    match,
    parse_method,
)
from kd.common.metrics.cost import cost
from kd.common.metrics.quality import agreement, classification_metrics, regression_metrics
from kd.common.outputs import FeatureHooks
from kd.common.reporting.model_card import save_student
from kd.common.reporting.results import RESULTS, headline, model_table, write_report
from kd.common.reporting.tables import markdown
from kd.common.training.arguments import KDTrainingArguments
from kd.common.training.inference import NOT_INPUTS, run_inference
from kd.common.training.run import TrainerRun
from kd.common.utils.devices import best_device
from kd.common.utils.errors import UserError
from kd.common.utils.files import read_json
from kd.common.utils.ranges import Positive, Share

VALIDATION_SHARE = 0.1
DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 10,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 256,
    "train_sampling_strategy": "random",
    "eval_strategy": "no",
    "report_to": "none",
}


@dataclass
class Distilled:
    """What `distill` returns. Its text is the table of the results.

    Attributes:
        student: The student of the first seed, in eval mode.
        control: The control of the first seed; None without one.
        metrics: {role: {split: {metric: value}}} of teacher, control and student; means over several seeds.
        results: The content of results.json.
        notes: What was assumed.
    """

    student: nn.Module
    control: nn.Module | None
    results: dict[str, Any]
    history: dict[str, list[dict[str, Any]]] = field(repr=False)
    notes: list[str]

    @property
    def metrics(self) -> dict[str, Any]:
        return {role: model["metrics"] for role, model in self.results["models"].items() if model}

    def save(self, folder: str | Path) -> None:
        """Writes `student/` with its weights and model card, `results.json`, `report.md` and `curves.png`."""
        student = self.student if isinstance(self.student, PreTrainedModel) else NamedOutputs(self.student)
        save_student(Path(folder, "student"), student, self.results, usage(student))
        write_report(folder, self.results, self.history or None)

    def __repr__(self) -> str:
        return "\n".join([markdown(*model_table(self.results)), headline(self.results), *self.notes])


def distill(
    teacher: nn.Module,
    student: nn.Module | Callable[[], nn.Module],
    train: Any,
    validation: Any = None,
    method: str | Method = "kd",
    seeds: Sequence[int] = (0,),
    control: bool = True,
    output_dir: str | Path | None = None,
    features: Mapping[str, str] | None = None,
    feature_weight: float = 1.0,
    **training: Any,
) -> Distilled:
    """Trains a student to predict as its teacher does, and the same student without the teacher as a control.

    Args:
        teacher: A trained module that returns logits (batch, classes), or `logits` by name.
        student: A module, of which each seed trains a copy, or a function that makes one for each seed.
        train, validation: Anything with a length and rows: dictionaries of inputs and `labels`, (input, label)
            tuples, or inputs alone. Without `validation`, a tenth of train is set aside, the same in every run.
            Without labels the student is trained on the teacher's outputs alone, and there is no control.
        method: Name of a method with its arguments, such as "dkd:beta=2", or a Method.
        seeds: Seeds of initialization, data order and dropout.
        output_dir: Folder of the run; pass `resume_from_checkpoint=True` to continue it. None: nothing is kept.
        features: {path of a student's submodule: path of the teacher's} whose outputs are matched by their squared
            difference, through a linear projector where widths differ. Relation methods such as "rkd" use the last.
        feature_weight: Weight of the matched features.
        training: Arguments of `KDTrainingArguments`, such as `num_train_epochs` or `learning_rate`.

    Raises UserError for models, data and arguments that do not fit together.
    """
    rows, notes = {"train": Rows(train)}, []
    if validation is not None:
        rows["validation"] = Rows(validation)
    elif rows["train"].labels is not None:
        rows = _with_validation(rows["train"])
        notes.append(f"No validation data: {len(rows['validation'])} of {len(train)} training rows are set aside.")
    if len(seeds) > 1 and isinstance(student, nn.Module):
        notes.append("All seeds share the student's initial weights: pass a function that makes it to vary them.")
    with ExitStack() as stack:
        stack.enter_context(restored(teacher))
        folder = str(output_dir or stack.enter_context(tempfile.TemporaryDirectory()))
        task = _Task(teacher, student, rows, features or {})
        defaults = DEFAULTS | {
            "learning_rate": 5e-5 if task.is_transformers else 1e-3,
            "save_strategy": "no" if output_dir is None else "epoch",
        }
        several = list(seeds) if len(seeds) > 1 else None
        args = KDTrainingArguments(folder, seed=seeds[0], seeds=several, **(defaults | training))
        return _distill(task, method, feature_weight, control, args, notes)


def _with_validation(train: Rows) -> dict[str, Rows]:
    """A tenth of each class becomes the validation split, the same in every run."""
    assert train.labels is not None
    chosen = holdout(train.labels, VALIDATION_SHARE)
    if not chosen.any():
        raise UserError(f"{len(train)} training rows are too few to set a tenth aside: pass `validation`")
    parts = {name: np.flatnonzero(mask) for name, mask in (("train", ~chosen), ("validation", chosen))}
    return {name: Rows(Subset(train.rows, part.tolist()), train.labels[part]) for name, part in parts.items()}


class _Task:
    """Teacher, students and data in the form that the trainer takes.

    Attributes:
        classes: Number of logits of both models.
        matched: The features of student and teacher that are matched, in order.
        not_for_student: Columns that only the teacher takes.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module | Callable[[], nn.Module],
        rows: dict[str, Rows],
        features: Mapping[str, str],
    ) -> None:
        self.teacher, self.rows = NamedOutputs(teacher), rows
        self._make = partial(copy.deepcopy, student) if isinstance(student, nn.Module) else student
        module = self._make()
        self.is_transformers = isinstance(module, PreTrainedModel)
        names = [name for name in rows["train"][0] if name not in NOT_INPUTS]
        for_student, for_teacher = accepted(module, names), accepted(teacher, names)
        self.not_for_student = sorted(set(for_teacher) - set(for_student))
        inputs = [name for name in names if name in {*for_student, *for_teacher}]
        labelled = ["labels"] if self.labels is not None else []
        padding = getattr(getattr(teacher, "config", None), "pad_token_id", None) or 0
        self.collate = Collator([*inputs, *labelled, "sample_id"], padding)
        batch = self.collate([rows["train"][i] for i in range(min(2, len(rows["train"])))])
        self.sample = {name: batch[name] for name in inputs}
        prefix = "" if self.is_transformers else "module."
        self.classes, of_teacher = self._probe(self.teacher, [f"module.{path}" for path in features.values()])
        classes, of_student = self._probe(self._named(module), [prefix + path for path in features])
        if classes != self.classes:
            raise UserError(f"the student returns {classes} logits and the teacher {self.classes}: make them equal")
        self.matched = list(zip(of_student, of_teacher, strict=True))

    @property
    def labels(self) -> np.ndarray | None:
        return self.rows["train"].labels

    @property
    def regression(self) -> bool:
        return self.labels is not None and self.labels.dtype.kind == "f"

    def new_student(self) -> nn.Module:
        return self._named(self._make())

    def _named(self, module: nn.Module) -> nn.Module:
        return module if isinstance(module, PreTrainedModel) else NamedOutputs(module)

    def inputs_of(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The columns that a model takes."""
        return batch if model is self.teacher else {n: v for n, v in batch.items() if n not in self.not_for_student}

    @torch.no_grad()
    def _probe(self, model: nn.Module, paths: list[str]) -> tuple[int, list[Feature]]:
        """The number of logits of a model, and the shapes of the outputs of its submodules."""
        with restored(model):
            hooks = FeatureHooks(model, {path: path for path in paths})
            logits = model.eval()(**self.inputs_of(model, self.sample)).logits
            outputs = hooks.take()
            hooks.remove()
        if logits is None or logits.dim() != 2:
            raise UserError(f"a model must return logits (batch, classes), got {getattr(logits, 'shape', None)}")
        shapes = [outputs[path].shape for path in paths]
        is_map = [len(shape) == 4 for shape in shapes]
        found = zip(paths, shapes, is_map, strict=True)
        return logits.shape[1], [Feature(p, s[1] if maps else s[-1], s[-1] if maps else 0) for p, s, maps in found]

    def method(self, method: str | Method, feature_weight: float) -> Method:
        """The method by its name, with the features that are matched, and without the labels where there are none."""
        if isinstance(method, str):
            build = parse_method(method, METHODS | {"kd": _regression_kd} if self.regression else METHODS)
            method = build(self._spec())
        for number, (student, teacher) in enumerate(self.matched):
            method += _hint(f"features_{number}", feature_weight, student, teacher)
        if self.labels is None:
            terms = {name: term for name, term in method.terms.items() if name != "task"}
            method = Method(terms, method.features, method.teacher_features, method.watched)
        return method

    def _spec(self) -> TaskSpec:
        def features_of(model: Any) -> ModelFeatures:
            if not self.matched:
                raise UserError('this method matches features: name them, as in features={"layer2": "layer4"}')
            found = [student if model == "student" else teacher for student, teacher in self.matched]
            return ModelFeatures(stages=found, head=found[-1], last=found[-1])

        train = self.labels if self.labels is not None else np.zeros(len(self.rows["train"]))
        return TaskSpec(
            classes=self.classes,
            student="student",
            teacher="teacher",
            features_of=features_of,
            pool=_pool,
            flatten=_pool,
            labels=torch.as_tensor(train),
            teacher_samples=_no_teacher_samples,
        )

    def predict(self, model: nn.Module, split: str) -> np.ndarray:
        """Logits (rows, classes), in fp32."""

        def call(**batch: Tensor) -> dict[str, Tensor]:
            return {"logits": model(**self.inputs_of(model, batch)).logits}

        outputs = run_inference(model, call, self.rows[split], self.collate, batch_size=256)  # type: ignore[arg-type]
        return torch.stack(outputs["logits"]).float().numpy()

    def evaluate(self, model: nn.Module, teacher_logits: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """A model's entry in results.json. `teacher_logits`: by split; the agreement with it is a metric."""
        metrics = {}
        for split in teacher_logits:
            logits, labels = self.predict(model, split), self.rows[split].labels
            metrics[split] = {} if self.regression else {"agreement": agreement(logits, teacher_logits[split])}
            if labels is not None and self.regression:
                metrics[split] |= regression_metrics(logits[:, 0], labels)
            elif labels is not None:
                metrics[split] |= classification_metrics(logits, labels)
        module = model.module if isinstance(model, NamedOutputs) else model
        one = {name: value[:1].to(best_device()) for name, value in self.inputs_of(model, self.sample).items()}
        return {"name": type(module).__name__, **cost(model, one), "metrics": metrics}

    def load(self, folder: str | Path) -> nn.Module:
        """A student that a run has saved."""
        model = self.new_student()
        return type(model).from_pretrained(folder) if isinstance(model, PreTrainedModel) else model.load(folder)


class _Run(TrainerRun):
    """A run that prints no table: the result shows it."""

    def show(self, results: dict[str, Any]) -> None:
        pass


def _distill(
    task: _Task,
    method: str | Method,
    feature_weight: float,
    control: bool,
    args: KDTrainingArguments,
    notes: list[str],
) -> Distilled:
    sizes = {split: len(task.rows[split]) if split in task.rows else None for split in ("train", "validation", "test")}
    fingerprint = data_fingerprint([sizes, list(task.sample), *([] if task.labels is None else [task.labels])])
    run = _Run(args)
    run.check_inputs(fingerprint, teacher=task.teacher)
    split = "validation" if "validation" in task.rows else "train"
    logits = {split: task.predict(task.teacher, split)}
    models = {"teacher": task.evaluate(task.teacher, logits)}
    for seed_run in run.each_seed():
        if control and task.labels is not None:
            models["control"] = task.evaluate(_train(seed_run, task, "control"), logits)
        student = _train(seed_run, task, "student", task.method(method, feature_weight))
        models["student"] = task.evaluate(student, logits)
        results = seed_run.results(
            domain="python",
            task=type(task.rows["train"].rows).__name__,
            method=method if isinstance(method, str) else " + ".join(method.terms),
            data=sizes | {"fingerprint": fingerprint},
            models=models,
            split=split,
            metric="agreement" if task.labels is None else "spearman" if task.regression else "accuracy",
            notes=" ".join(notes) or "none",
        )
        seed_run.finish(results, student, usage(student))
    run.summarize()
    first = run.folder / f"seed{args.seeds[0]}" if args.seeds else run.folder
    stages = {stage: first / "stages" / stage for stage in ("student", "control")}
    found = {stage: task.load(folder).eval() for stage, folder in stages.items() if folder.exists()}
    students = [module.module if isinstance(module, NamedOutputs) else module for module in found.values()]
    return Distilled(students[0], *(students[1:] or [None]), read_json(run.folder / RESULTS), run.history, notes)


def _train(run: TrainerRun, task: _Task, stage: str, method: Method | None = None) -> nn.Module:
    """A student trained by a method with its teacher, or on the labels alone."""
    teacher = {} if method is None else {"teacher": task.teacher, "teacher_features": method.teacher_features}
    method = method or labels(regression=task.regression)

    def build() -> nn.Module:
        return run.train(
            stage,
            task.new_student(),
            {},
            objective=method.objective,
            train_dataset=task.rows["train"],
            data_collator=task.collate,
            features=method.features,
            not_for_student=task.not_for_student,
            **teacher,
        )

    return run.stage(stage, build, task.load)


def usage(student: nn.Module) -> str:
    """The code that loads a saved student, for its model card."""
    if isinstance(student, PreTrainedModel):
        name = type(student).__name__
        return f'from transformers import {name}\n\nstudent = {name}.from_pretrained("FOLDER").eval()'
    return (
        f"from safetensors.torch import load_model\n\nstudent = ...  # the {type(student.module).__name__}, untrained\n"
        f'load_model(student, "FOLDER/{WEIGHTS}")'
    )


def _hint(name: str, weight: float, student: Feature, teacher: Feature) -> Method:
    """The squared difference of two features, through a linear projector where widths differ (arXiv:1412.6550)."""
    projector: nn.Module | None = None
    if student.width != teacher.width:
        projector = (
            nn.Conv2d(student.width, teacher.width, 1) if teacher.size else nn.Linear(student.width, teacher.width)
        )
    return match(name, weight, student, teacher, losses.feature_l2, projector)


def _pool(feature: Tensor, mask: Tensor | None = None) -> Tensor:
    """Maps (batch, width, size, size) or hidden states (batch, positions, width) -> (batch, width)."""
    if feature.dim() == 4:
        return reduce(feature, "batch width height columns -> batch width", "mean")
    if feature.dim() == 3 and mask is not None:
        kept = mask.unsqueeze(-1).to(feature.dtype)
        return (feature * kept).sum(1) / kept.sum(1)
    return reduce(feature, "batch ... width -> batch width", "mean")


def _no_teacher_samples() -> tuple[Tensor, Tensor]:
    raise UserError("this method needs features of chosen training samples: use the scripts of a domain")


def _regression_kd(spec: TaskSpec, *, alpha: Share = 0.1, temperature: Positive = 1.0) -> Method:
    """alpha * labels + (1 - alpha) * squared difference to the teacher's predictions."""
    return labels_and_soft_targets(alpha, temperature, regression=True)
