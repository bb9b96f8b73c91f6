"""The teacher of a run: loaded from weights or built, and checked before anything is trained."""

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kd.common.cli import reject_unused
from kd.common.data.sources import print_notes
from kd.common.metrics.quality import constant_score
from kd.common.utils.devices import process
from kd.common.utils.errors import UserError
from kd.image_classification.data.image_data import ImageData
from kd.image_classification.student_model.evaluation import Logits, evaluate
from kd.image_classification.teacher_model.classifier import ImageClassifier
from kd.image_classification.teacher_model.published import Normalization
from kd.image_classification.teacher_model.teacher import FILE_ADVICE, is_project_classifier, load_teacher

if TYPE_CHECKING:
    from kd.image_classification.student_model.arguments import ImageTrainingArguments, PairArguments

ROUNDING = 0.005  # of published accuracies, and between platforms
WEIGHTS = {".pth", ".pt", ".ckpt", ".tar", ".bin", ".safetensors"}  # suffixes of files of weights
WEAK = 0.15  # share of the way from chance to 1; right weights in a wrong network reach less
VALIDATION_FROM_TRAIN = (
    "the validation images were set aside from train, which the teacher was probably trained on: its validation "
    "metrics are optimistic; --validation_share 0 reports test instead"
)


class LoadedTeacher(NamedTuple):
    """data: in the normalization of the teacher. results: its evaluation, if it has weights of another project."""

    model: ImageClassifier
    data: ImageData
    is_trained: bool
    results: tuple[dict[str, Any], Logits] | None

    @classmethod
    def load(cls, pair: "PairArguments", data: ImageData, training: "ImageTrainingArguments") -> "LoadedTeacher":
        """See `PairArguments.load_teacher`."""
        name, weights = _name_and_weights(pair)
        normalization = Normalization(pair.teacher_mean, pair.teacher_std)
        model, normalized, is_trained = load_teacher(name, data, training.seed, weights, normalization)
        if is_trained:
            reject_unused(f"teacher {pair.teacher} is trained already", pair, "teacher_epochs")
        if not is_trained or (weights is None and is_project_classifier(name)):
            reason = f"teacher {pair.teacher} has no weights of another project"
            reject_unused(reason, pair, "teacher_accuracy", "allow_weak_teacher", "teacher_mean", "teacher_std")
            if not is_trained and data.model_labels is not None:
                raise UserError(
                    f"--label_names and --trust_label_order have no effect, because teacher {pair.teacher} is trained "
                    "on these data: leave them out"
                )
            print_notes(f"teacher {pair.teacher}", normalized.notes[len(data.notes) :])
            return cls(model, normalized, is_trained, None)
        notes = normalized.notes[len(data.notes) :]
        if data.validation_is_from_train:
            notes.append(VALIDATION_FROM_TRAIN)
        print_notes(f"teacher {pair.teacher}", notes)
        results = evaluate(pair.teacher, model, normalized, workers=training.dataloader_num_workers)
        _check(pair, results[0]["metrics"], normalized)
        return cls(model, replace(normalized, notes=[*data.notes, *notes]), True, results)


def _name_and_weights(pair: "PairArguments") -> tuple[str, str | None]:
    """The architecture, folder or Hub name of the teacher, and a file with its weights."""
    if not os.path.isfile(pair.teacher):
        if Path(pair.teacher).suffix in WEIGHTS:
            raise UserError(f"there is no file {pair.teacher}: pass the file of the weights as --teacher")
        if pair.teacher_architecture is not None:
            raise UserError(
                f"--teacher_architecture is that of weights in --teacher FILE, but {pair.teacher} is no file: pass "
                f"--teacher {pair.teacher_architecture} --teacher_weights FILE, or leave it out"
            )
        return pair.teacher, pair.teacher_weights
    if pair.teacher_weights is not None:
        raise UserError(f"--teacher {pair.teacher} is a file of weights already: leave out --teacher_weights")
    if pair.teacher_architecture is None:
        raise UserError(f"--teacher {pair.teacher} is a file: {FILE_ADVICE}")
    return pair.teacher_architecture, pair.teacher


def _check(pair: "PairArguments", metrics: dict[str, Any], data: ImageData) -> None:
    """Prints the accuracy on each split. Raises UserError if it is too low on test or, without test, on validation."""
    accuracies = {split: values["accuracy"] for split, values in metrics.items()}
    if process()[0] == 0:
        print(f"teacher {pair.teacher}: accuracy", ", ".join(f"{a:.4f} on {split}" for split, a in accuracies.items()))
    split = "test" if "test" in accuracies else data.selection_split
    accuracy, labels = accuracies[split], data.splits[split].labels.numpy()
    causes = (
        "the causes may be another network with the same shapes (--teacher_architecture), another normalization "
        "(--teacher_mean, --teacher_std) or another order of the labels (--label_names)"
    )
    if pair.teacher_accuracy is not None and accuracy < pair.teacher_accuracy - ROUNDING:
        raise UserError(
            f"teacher {pair.teacher} has an accuracy of {accuracy:.4f} on {split}, not {pair.teacher_accuracy:g}: "
            f"{causes}; or pass a lower --teacher_accuracy"
        )
    chance = constant_score(labels, len(data.label_names), "accuracy")
    if not pair.allow_weak_teacher and accuracy < chance + WEAK * (1 - chance):
        raise UserError(
            f"teacher {pair.teacher} has an accuracy of {accuracy:.4f} on {split}, near chance ({chance:.4f}): "
            f"{causes}; or pass --allow_weak_teacher"
        )
