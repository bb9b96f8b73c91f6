"""The steps that a distillation is made of, as stages of one run that can be resumed, and the report at the end."""

from typing import Any

from transformers import default_data_collator

from kd.common.metrics.chance import classifier_warning
from kd.common.objective import Objective
from kd.common.pretrained import stage_loader
from kd.common.training.arguments import KDTrainingArguments
from kd.common.training.run import TrainerRun
from kd.common.training.teacher_outputs import TeacherOutputs, cache_teacher_outputs
from kd.example_domain.data.loading import LabelledData
from kd.example_domain.student_model.evaluation import evaluate, trainer_metrics
from kd.example_domain.teacher_model.classifier import Classifier, new_classifier

USAGE = """import torch
from kd.example_domain.teacher_model.classifier import Classifier

model = Classifier.from_pretrained("{folder}").eval()
logits = model(torch.zeros(1, {length})).logits  # signals (batch, length)
print(model.config.id2label[logits.argmax().item()])"""


class Distillation:
    """One run on `data`, with a trained teacher if one is `given`; `others` are the script's other arguments, for the
    recipe.
    """

    def __init__(
        self, data: LabelledData, given: Classifier | None, training: KDTrainingArguments, *others: object
    ) -> None:
        self.data, self.run = data, TrainerRun(training, *others)
        self.run.check_inputs(data.fingerprint, teacher=given)
        self.measured: dict[str, Any] | None = None

    def trained(self, stage: str, width: int, objective: Objective, **teacher: Any) -> Classifier:
        """A stage: a classifier trained for `objective`. `teacher`: what KDTrainer is to know of one, as
        `teacher_outputs=...` or, for objectives that need more of it than logits, `teacher=...`.
        """

        def build() -> Classifier:
            return self.run.train(
                stage,
                new_classifier(self.data.label_names, width),
                {},
                objective=objective,
                train_dataset=self.data.splits["train"],
                eval_dataset=self.data.splits["validation"],
                data_collator=default_data_collator,
                compute_metrics=trainer_metrics,
                **teacher,
            )

        return self.run.stage(stage, build, stage_loader(Classifier))

    def warn_of_guessing(self, teacher: Classifier) -> None:
        """Measures a teacher before it teaches, and warns where it is no better than guessing."""
        self.measured = evaluate(f"width {teacher.config.width}", teacher, self.data)
        accuracy = self.measured["metrics"]["validation"]["accuracy"]
        labels, classes = self.data.splits["validation"]["labels"][:].numpy(), len(self.data.label_names)
        self.run.warn(classifier_warning(self.measured["name"], "accuracy", accuracy, labels, classes))

    def listen(self, teacher: Classifier) -> TeacherOutputs:
        """The logits of a frozen teacher for the training samples: it speaks once, not every epoch."""
        rows, folder = self.data.splits["train"], self.run.folder / "teacher_outputs"
        with self.run.timed("teacher_outputs"):
            return cache_teacher_outputs(teacher, rows, default_data_collator, folder, batch_size=256)

    def report(self, method: str, teacher: Classifier, control: Classifier | None, student: Classifier) -> None:
        """Measures all three, writes the report and the student's folder, prints the table."""
        data = self.data
        sizes: dict[str, int | None] = {"test": None} | {split: len(rows) for split, rows in data.splits.items()}
        entries = {
            "teacher": self.measured or evaluate(f"width {teacher.config.width}", teacher, data),
            "control": control and evaluate(f"width {control.config.width}, labels only", control, data, teacher),
            "student": evaluate(f"width {student.config.width}, {method}", student, data, teacher),
        }
        results = self.run.results(
            domain="example-domain",
            task=data.name,
            method=method,
            data=sizes | {"fingerprint": data.fingerprint},
            models=entries,
            split="validation",
            metric="accuracy",
            selection=self.run.args.selection,
            data_notes="; ".join(data.notes) or "none",
        )
        length = len(data.splits["train"][0]["values"])
        self.run.finish(results, student, USAGE.format(folder=self.run.folder / "student", length=length))
