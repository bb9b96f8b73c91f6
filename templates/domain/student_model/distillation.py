"""The steps of a distillation: training a classifier as a stage of a run that can be resumed, and the report."""

from typing import Any

from transformers import default_data_collator

from kd.common.methods import Method
from kd.common.pretrained import stage_loader
from kd.common.training.run import TrainerRun
from kd.example_domain.data.loading import LabelledData
from kd.example_domain.student_model.evaluation import trainer_metrics
from kd.example_domain.teacher_model.classifier import Classifier, new_classifier

USAGE = """import torch
from kd.example_domain.teacher_model.classifier import Classifier

model = Classifier.from_pretrained("{folder}").eval()
logits = model(torch.zeros(1, {length})).logits  # signals (batch, length)
print(model.config.id2label[logits.argmax().item()])"""


def train(run: TrainerRun, stage: str, width: int, data: LabelledData, method: Method, **teacher: Any) -> Classifier:
    """A classifier trained by `method`. `teacher`: for KDTrainer, `teacher_outputs=...` or, for methods that need more
    of a teacher than its logits, `teacher=...`.
    """

    def build() -> Classifier:
        return run.train(
            stage,
            new_classifier(data.label_names, width),
            {},
            objective=method.objective,
            train_dataset=data.splits["train"],
            eval_dataset=data.splits["validation"],
            data_collator=default_data_collator,
            compute_metrics=trainer_metrics,
            **teacher,
        )

    return run.stage(stage, build, stage_loader(Classifier))


def report(run: TrainerRun, data: LabelledData, student: Classifier, models: dict[str, Any]) -> None:
    """Writes the report of the evaluated `models` and the student's folder, and prints the table."""
    sizes: dict[str, int | None] = {"test": None} | {split: len(rows) for split, rows in data.splits.items()}
    results = run.results(
        domain="example-domain",
        task=data.name,
        method="kd",
        data=sizes | {"fingerprint": data.fingerprint},
        models=models,
        split="validation",
        metric="accuracy",
        selection=run.args.selection,
        data_notes="; ".join(data.notes) or "none",
    )
    length = len(data.splits["train"][0]["values"])
    run.finish(results, student, USAGE.format(folder=run.folder / "student", length=length))
