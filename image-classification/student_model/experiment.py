"""One run on images: who is trained on what, as stages that can be resumed, and the report at the end."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import ViTImageProcessor

from common.inference import as_it_is
from common.objective import Objective, task_loss
from common.report import model_card, print_table, write_report
from common.run import Run
from common.utils.devices import best_device
from common.utils.files import write_text, writing_folder
from image_classification.data.loading import ImageData
from image_classification.student_model.arguments import ImageTrainingArguments
from image_classification.student_model.evaluation import evaluate, trainer_metrics
from image_classification.student_model.matching import Method
from image_classification.teacher_model.classifier import ImageClassifier, new_classifier
from image_classification.teacher_model.folding import frozen
from image_classification.teacher_model.teacher import load_trained, trained_folder

USAGE = """from PIL import Image
from transformers import AutoImageProcessor
from image_classification.teacher_model.classifier import ImageClassifier, new_classifier
from image_classification.teacher_model.folding import frozen
from image_classification.teacher_model.teacher import load_trained, trained_folder

processor = AutoImageProcessor.from_pretrained("{folder}")
model = ImageClassifier.from_pretrained("{folder}").eval()
logits = model(**processor(Image.open("picture.png").convert("RGB"), return_tensors="pt")).logits
print(model.config.id2label[logits.argmax().item()])"""


class Experiment:
    """The stages of one run of `method` on `data`; `instances` are the script's other arguments, for the recipe."""

    def __init__(self, method: str, training: ImageTrainingArguments, data: ImageData, *instances: Any) -> None:
        training.output_dir = training.output_dir or f"runs/image-classification/{method}"
        self.method, self.args, self.data = method, training, data
        self.run = Run(training, *instances)

    def stage(self, name: str, build: Callable[[], ImageClassifier]) -> ImageClassifier:
        """The classifier of a stage: loaded if the stage is finished, else built and saved."""
        return self.run.stage(name, build, ImageClassifier.from_pretrained, image_processor(self.data))

    def fit(
        self, name: str, model: ImageClassifier, objective: Objective, epochs: float | None = None, **trainer: Any
    ) -> ImageClassifier:
        """Trains a stage's model on augmented views; `trainer` are further arguments of KDTrainer."""
        device = best_device()
        return self.run.train(
            name,
            model.to(memory_format=torch.channels_last),  # type: ignore[call-overload]
            {} if epochs is None else {"num_train_epochs": epochs},
            objective=objective,
            train_dataset=self.data.views("train", device, augment=True, seed=self.args.seed),
            eval_dataset=self.data.views("validation", device) if "validation" in self.data.splits else None,
            data_collator=as_it_is,
            compute_metrics=trainer_metrics,
            **trainer,
        )

    def labels_only(
        self, name: str, build: Callable[[], ImageClassifier], epochs: float | None = None
    ) -> ImageClassifier:
        """A stage without a teacher: a teacher to be, or a control."""
        return self.stage(name, lambda: self.fit(name, build(), Objective(task=(1.0, task_loss())), epochs))

    def distill(
        self,
        teacher: ImageClassifier,
        build: Callable[[], ImageClassifier],
        method: Callable[[ImageClassifier], Method],
    ) -> ImageClassifier:
        """The stage `student`: what `build` makes, trained by the method made for it."""

        def build_and_fit() -> ImageClassifier:
            student = build()
            how = method(student)
            return self.fit(
                "student",
                student,
                how.objective,
                features=how.features,
                teacher=frozen(teacher, self.args.precision),
                teacher_features=how.teacher_features,
            )

        return self.stage("student", build_and_fit)

    def teacher(self, name: str, epochs: float | None) -> ImageClassifier:
        """The trained classifier of a folder, in whose normalization the data are seen from here on, or a network of
        that architecture, trained on the labels.
        """
        folder = trained_folder(name)
        if folder is None:
            return self.labels_only("teacher", lambda: new_classifier(name, self.data.config), epochs)
        teacher, self.data = load_trained(folder, self.data)
        return teacher

    def report(self, **models: tuple[str, ImageClassifier] | None) -> dict[str, Any]:
        """Measures `teacher`, `control` and `student` (name, model), writes report and student, prints the table."""
        entries: dict[str, Any] = {}
        said = None
        for role, given in models.items():
            if given is not None:
                entries[role], logits = evaluate(*given, self.data, said)
                said = logits if role == "teacher" else said
        results = self._results(entries)
        if PartialState().is_main_process:
            if models.get("student"):
                self._save_student(models["student"][1], results)  # type: ignore[index]
            write_report(self.run.folder, results, self.run.history)
            print_table(results)
            print(f"report: {self.run.folder / 'report.md'}")
        return results

    def _results(self, entries: dict[str, Any]) -> dict[str, Any]:
        split = self.data.selection_split
        sizes = {name: len(images) for name, images in self.data.splits.items()}
        return self.run.results(
            domain="image-classification",
            task=self.data.name,
            method=self.method,
            data={name: sizes.get(name) for name in ("train", "validation", "test")}
            | {"fingerprint": self.data.fingerprint},
            models={role: {k: v for k, v in entry.items() if k != "parts"} for role, entry in entries.items()},
            split=split,
            metric="accuracy",
            selection="last epoch; no split chose anything",
            data_notes="; ".join(self.data.notes) or "none",
            parameters_of_parts=_of_parts(entries, "parameters"),
            flops_of_parts=_of_parts(entries, "flops"),
        )

    def _save_student(self, student: ImageClassifier, results: dict[str, Any]) -> Path:
        folder = self.run.folder / "student"
        with writing_folder(folder) as partial:
            student.save_pretrained(partial)
            image_processor(self.data).save_pretrained(partial)
            card = model_card(results, f"{self.data.name}: {self.method}", USAGE.format(folder=folder))
            write_text(partial / "README.md", card)
        return folder


def _of_parts(entries: dict[str, Any], figure: str) -> dict[str, dict[str, int | None]]:
    return {role: {name: part[figure] for name, part in e["parts"].items()} for role, e in entries.items()}


def image_processor(data: ImageData) -> ViTImageProcessor:
    """Makes pictures into what a classifier of `data` takes: resized, between 0 and 1, normalized."""
    grey = len(data.mean) == 1
    return ViTImageProcessor(
        size={"height": data.size, "width": data.size},
        image_mean=data.mean * 3 if grey else data.mean,
        image_std=data.std * 3 if grey else data.std,
    )
