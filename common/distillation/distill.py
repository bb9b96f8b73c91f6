"""Distillation in three lines, for any models and data:

    from kd.common import distill

    result = distill(teacher, student, train, validation)
    print(result)

The run and the trainer are those of the scripts.
"""

import io
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import nn
from torch.utils.data import Subset

from kd.common.data.fingerprints import data_fingerprint
from kd.common.distillation.adapters import NamedOutputs, Rows, restored
from kd.common.distillation.evaluation import Evaluation
from kd.common.distillation.task import Task
from kd.common.methods import Method, labels
from kd.common.reporting.model_card import Card, save_student
from kd.common.reporting.report import headline, model_table, print_table, warnings_of
from kd.common.reporting.results import RESULTS
from kd.common.reporting.tables import markdown
from kd.common.training.arguments import KDTrainingArguments
from kd.common.training.trainer_run import TrainerRun
from kd.common.utils.devices import process
from kd.common.utils.errors import UserError
from kd.common.utils.files import read_json, write_json

VALIDATION_SHARE = 0.1
DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 10,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 256,
    "train_sampling_strategy": "random",
    "eval_strategy": "no",
    "disable_tqdm": True,
    "report_to": "none",
}
TRANSFORMERS = {"learning_rate": 5e-5, "precision": "auto"}
OTHERS = {"learning_rate": 1e-3, "precision": "fp32"}  # not every module supports autocast
ELSEWHERE = {
    "seed": "seeds=(0,)",
    "no_control": "control=False",
    "alpha": 'method="kd:alpha=0.5"',
    "temperature": 'method="kd:temperature=2"',
}


@dataclass
class DistillArguments:
    """Distillation. The recipe of a run, which is continued only with the same arguments."""

    method: str = field(metadata={"help": "Method with its arguments, such as dkd:beta=2."})
    features: list[str] = field(default_factory=list, metadata={"help": "Paths of student=teacher."})
    feature_weight: float = field(default=1.0, metadata={"help": "Weight of the features."})


@dataclass(repr=False)
class Distilled:
    """What `distill` returns. Its text is the table of the results.

    Attributes:
        student: The student of the first seed, in eval mode.
        control: The control of the first seed; None without one.
        results: The content of results.json: means over several seeds.
        notes: What was assumed.
        card: The part of the student's model card that is not in the results.
    """

    student: nn.Module
    control: nn.Module | None
    results: dict[str, Any]
    notes: list[str]
    card: Card

    @property
    def metrics(self) -> dict[str, dict[str, dict[str, float]]]:
        """{role: {split: {metric: value}}} of teacher, control and student."""
        return {role: model["metrics"] for role, model in self.results["models"].items() if model}

    @property
    def verdict(self) -> dict[str, Any] | None:
        """Whether the student is better than its control, as in results.json; None without labels."""
        return self.results.get("verdict")

    def save(self, folder: str | Path) -> None:
        """Writes the student's weights, a model card and `results.json` into a folder."""
        save_student(Path(folder), NamedOutputs(self.student, []), self.results, self.card)
        write_json(Path(folder, RESULTS), self.results)

    def __repr__(self) -> str:
        with redirect_stdout(io.StringIO()) as table:
            print_table(self.results)  # with the verdict's warnings
        warnings = [f"Warning: {text}" for text in self.results["warnings"]]
        return "\n".join([table.getvalue().strip(), *warnings, *self.notes])

    def _repr_markdown_(self) -> str:  # in notebooks
        warnings = [f"**Warning:** {text}" for text in warnings_of(self.results)]
        return "\n\n".join([markdown(*model_table(self.results)), headline(self.results), *warnings, *self.notes])


def distill(
    teacher: nn.Module,
    student: nn.Module | Callable[[], nn.Module],
    train: Any,
    validation: Any = None,
    method: str | Method = "kd",
    seeds: Iterable[int] = (0,),
    control: bool = True,
    output_dir: str | Path | None = None,
    features: Mapping[str, str] | None = None,
    feature_weight: float = 1.0,
    **training: Any,
) -> Distilled:
    """Trains a student to predict as its teacher does, and the same student on the labels alone as a control.

    Args:
        teacher: A trained module that returns logits (batch, classes), or `logits` by name. It is not changed.
        student: A module, of which each seed trains a copy, or a function that creates one for each seed.
            If it reads other tokens than the teacher, the rows have the teacher's as teacher_input_ids and
            teacher_attention_mask.
        train, validation: Anything with a length and rows: dictionaries of inputs and `labels`, (input, label) tuples,
            or inputs alone. Labels are class ids, floats for regression, or floats of 0 and 1 (rows, labels) for any
            number of labels per row. Without `validation`, a tenth of `train` is set aside. A label that is None, NaN
            or a negative class id is missing: such a row trains the student by the teacher's outputs and features, and
            counts in no metric; the control makes as many updates on the other rows. Without labels, there is no
            control.
        method: A method with its arguments, such as "dkd:beta=2", or a Method.
        seeds: Random seeds for initialization, data order and dropout.
        output_dir: Folder of the run; `resume_from_checkpoint=True` continues it. None: a temporary folder.
        features: {path of a student's submodule: path of the teacher's} to match. The mean squared difference of
            their outputs is added to the loss, through a linear projector if their widths differ. Methods that compare
            features in another way ("rkd", "sp", "pkt", "cc", "wkd") use the last one instead.
        feature_weight: Weight of the mean squared differences.
        training: Arguments of `KDTrainingArguments`, such as `num_train_epochs` or `learning_rate`.

    Raises UserError for models, data and arguments that do not fit together.
    """
    data, notes = {"train": Rows(train)}, list[str]()
    if validation is not None:
        data["validation"] = Rows(validation)
    elif data["train"].labels is not None:
        data["train"], data["validation"] = data["train"].split(VALIDATION_SHARE)
        notes.append(f"{len(data['validation'])} of {len(train)} training rows were set aside for validation.")
    with ExitStack() as stack:
        task = Task(teacher, student, data, method, features or {}, feature_weight)
        notes += task.leave_out_unlabelled()
        stack.enter_context(restored(teacher))
        if output_dir is None and process()[1] > 1:
            raise UserError("several processes need a common folder: pass `output_dir`")
        folder = output_dir or stack.enter_context(tempfile.TemporaryDirectory())
        defaults = DEFAULTS | (TRANSFORMERS if task.is_transformers else OTHERS)
        defaults |= {"save_strategy": "no" if output_dir is None else "epoch", "no_control": not control}
        args = training_arguments(folder, list(seeds), defaults, training)
        if args.seeds and isinstance(student, nn.Module):
            notes.append("All seeds share the student's initial weights: pass a function to vary them.")
        paths = [f"{one}={other}" for one, other in (features or {}).items()]
        run = QuietRun(args, DistillArguments(task.method_name, paths, feature_weight))
        run.plots = output_dir is not None
        return distill_task(run, task, notes)


def training_arguments(
    folder: Any, seeds: list[int], defaults: dict[str, Any], training: dict[str, Any]
) -> KDTrainingArguments:
    """Raises UserError for unknown or invalid arguments."""
    known = KDTrainingArguments.complete().__dataclass_fields__
    for name in training:
        if name in ELSEWHERE:
            raise UserError(f"{name} is not a training argument of distill: pass {ELSEWHERE[name]}")
        if name not in known:
            close = get_close_matches(name, known, n=1)
            raise UserError(f"there is no argument {name!r}" + (f"; did you mean {close[0]}?" if close else ""))
    if not seeds:
        raise UserError("seeds must name at least one seed")
    try:
        several = seeds if len(seeds) > 1 else None
        return KDTrainingArguments(str(folder), seed=seeds[0], seeds=several, **(defaults | training))
    except ValueError as error:
        raise UserError(str(error)) from error


class QuietRun(TrainerRun):
    """A run that prints no table: the result shows it."""

    quiet = True


def distill_task(run: QuietRun, task: Task, notes: list[str]) -> Distilled:
    """Trains and evaluates control and student of each unfinished seed. Reads the result from the folder."""
    fingerprint = data_fingerprint([task.sizes, list(task.sample), *task.labels_by_split.values()])
    run.check_inputs(fingerprint, **task.pretrained)
    evaluation = Evaluation(task)
    run.warn(evaluation.warning())
    stages = ["student"] if run.args.no_control or not task.labelled else ["control", "student"]
    card = replace(task.new_student().card, origins=task.origins)
    for seed_run in run.each_seed():
        for stage in stages:
            student = seed_run.stage(stage, partial(train, seed_run, task, evaluation, stage), task.load)
            evaluation.add(stage, student)
        results = seed_run.results(
            domain="python",
            task=dataset_name(task.data["train"].rows),
            method=task.method_name,
            data=task.sizes | {"fingerprint": fingerprint},
            models=evaluation.entries,
            split=evaluation.split,
            metric=evaluation.metric,
            measurements=evaluation.measurements,
            chance=evaluation.chance,
            selection=run.args.selection,
            data_notes=" ".join(notes) or "none",
        )
        seed_run.finish(results, student, card)
    run.summarize()
    PartialState().wait_for_everyone()
    first = run.folder / f"seed{run.args.seeds[0]}" if run.args.seeds else run.folder
    found = {stage: task.load(first / "stages" / stage).module.eval() for stage in stages}
    return Distilled(found["student"], found.get("control"), read_json(run.folder / RESULTS), notes, card)


def dataset_name(rows: Any) -> str:
    return dataset_name(rows.dataset) if isinstance(rows, Subset) else type(rows).__name__


def train(run: TrainerRun, task: Task, evaluation: Evaluation, stage: str) -> NamedOutputs:
    """Trains the student by the method with its teacher, or the control on the labels alone."""
    model = task.new_student()
    teacher: dict[str, Any] = {}
    rows = task.data["train"]
    if stage == "control":
        method, rows = labels(task=task.type), rows.labelled_part()
    else:
        method = task.new_method()
        teacher = {"teacher": task.teacher, "teacher_features": task.hooks(method.teacher_features)}
    with restored(task.teacher):
        return run.train(
            stage,
            model,
            {},
            objective=method.objective,
            samples=len(task.data["train"]),
            train_dataset=rows,
            eval_dataset=task.data.get("validation"),
            compute_metrics=lambda prediction: evaluation.metrics(prediction.predictions, prediction.label_ids),
            data_collator=task.collate,
            features=task.hooks(method.features),
            **teacher,
        )
