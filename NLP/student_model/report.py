"""The report of a text classifier's distillation: teacher, control and student, evaluated in the same way."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from accelerate import PartialState
from transformers import PreTrainedModel

from kd.common.metrics.quality import constant_score
from kd.common.training.run import TrainerRun
from kd.nlp.data.loading import Texts
from kd.nlp.student_model.bottleneck_classifier import BottleneckClassifier
from kd.nlp.student_model.evaluation import chance_warning, evaluate, metrics_by_split, validation_split
from kd.nlp.student_model.inputs import Inputs

USAGE = """from transformers import AutoTokenizer
from {module} import {model}

tokenizer = AutoTokenizer.from_pretrained("{folder}")
model = {model}.from_pretrained("{folder}").eval()
logits = model(**tokenizer("some text", return_tensors="pt")).logits
print(model.config.id2label[logits.argmax().item()])"""
Evaluation = tuple[dict[str, Any], dict[str, np.ndarray]]  # an entry of results.json, and logits by split


def evaluate_teacher(
    run: TrainerRun, inputs: Inputs, teacher: PreTrainedModel, name: str, ensemble: Sequence[str] = ()
) -> Evaluation:
    """Evaluates the teacher, or the mean logits and the total cost of the teacher and an `ensemble`. Warns about each
    teacher that is no better than chance.
    """
    texts = inputs.texts
    evaluations = [evaluate(name, teacher, texts)]
    for other_name, other in zip(ensemble, inputs.ensemble, strict=True):
        evaluations.append(evaluate(other_name, other.model, Texts.of(inputs.data, other.tokenizer)))
    for entry, _ in evaluations:
        run.warn(chance_warning(entry, texts))
    if not ensemble:
        return evaluations[0]
    logits = {split: np.mean([logits[split] for _, logits in evaluations], axis=0) for split in evaluations[0][1]}
    return _total_cost([entry for entry, _ in evaluations]) | {"metrics": metrics_by_split(texts, logits)}, logits


def _total_cost(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The entry of an ensemble, without metrics: sums of the costs of its models."""
    latencies = [entry["latency_ms"] for entry in entries]
    return {
        "name": " + ".join(entry["name"] for entry in entries),
        "parameters": sum(entry["parameters"] for entry in entries),
        "megabytes": sum(entry["megabytes"] for entry in entries),
        "flops": sum(entry["flops"] or 0 for entry in entries) or None,
        "latency_ms": latencies[0] | {key: sum(one[key] for one in latencies) for key in ("median", "p90")},
    }


def report(
    run: TrainerRun,
    inputs: Inputs,
    method: str,
    student_name: str | None,
    teacher: PreTrainedModel,
    teacher_results: Evaluation,
    control: PreTrainedModel | None,
    student: PreTrainedModel,
) -> dict[str, Any] | None:
    """Evaluates control and student, writes the report and the student's folder, and prints the table. Returns the
    results in the main process, None in the others.
    """
    entry, logits = teacher_results
    models: dict[str, Any] = {"teacher": entry}
    size = student_name or f"{inputs.student_layers} layers"
    for role, model, trained_by in (("control", control, "labels only"), ("student", student, method)):
        models[role] = model and evaluate(f"{size}, {trained_by}", model, inputs.student_texts, logits)[0]
    if not PartialState().is_main_process:
        return None
    trained = {"teacher": teacher, "control": control, "student": student}
    teacher_is_shared = run.shared == run.folder / ".."  # the runs of distill_glue.py share other stages
    extra: dict[str, Any] = {"shared_by_all_seeds": "the teacher"} if teacher_is_shared else {}
    keys = {role: m.config.key_statistics for role, m in trained.items() if isinstance(m, BottleneckClassifier)}
    results = _results(run, inputs, method, models, **extra, **({"keys": keys} if keys else {}))
    has_bottleneck = isinstance(student, BottleneckClassifier)
    usage = USAGE.format(
        module="kd.nlp.student_model.bottleneck_classifier" if has_bottleneck else "transformers",
        model="BottleneckClassifier" if has_bottleneck else "AutoModelForSequenceClassification",
        folder=run.folder / "student",
    )
    run.finish(results, student, usage, inputs.student_texts.collate.tokenizer)
    return results


def _results(run: TrainerRun, inputs: Inputs, method: str, models: dict[str, Any], **extra: Any) -> dict[str, Any]:
    data = inputs.data
    sizes = {name: len(rows) for name, rows in inputs.texts.splits.items()}
    split, metric = validation_split(inputs.texts.splits), data.primary_metric
    labels = np.asarray(inputs.texts.splits[split]["labels"])
    return run.results(
        domain="NLP",
        task=data.name,
        method=method,
        data={
            "test": None,
            **sizes,  # MNLI has two validation splits, which are named here as well
            "validation": sum(n for name, n in sizes.items() if name.startswith("validation")),
            "fingerprint": data.fingerprint,
        },
        models=models,
        split=split,
        metric=metric,
        chance=None if data.regression else constant_score(labels, data.num_labels, metric),
        selection=run.args.selection,
        data_notes="; ".join(data.notes) or "none",
        model_notes="; ".join(inputs.notes) or "none",
        **extra,
    )
