"""Evaluation of text classifiers and regression models, identical during and after training, and reports of runs."""

from argparse import Namespace
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import EvalPrediction, PreTrainedModel

from kd.common.bottleneck.sizes import sizes
from kd.common.data.sources import print_notes
from kd.common.metrics.cost import cost
from kd.common.metrics.entities import OUTSIDE
from kd.common.metrics.label_sets import predict_labels
from kd.common.metrics.verdict import Measurement
from kd.common.reporting.saved_models import class_predictions
from kd.common.training.inference import NOT_INPUTS, Collate, column_array, run_inference
from kd.common.training.teacher_columns import has_output
from kd.common.training.trainer_run import TrainerRun
from kd.common.utils.tasks import IGNORED
from kd.nlp.data.loading import KNOWN, TextData, Texts, load_text_data
from kd.nlp.student_model.arguments import MatchingArguments
from kd.nlp.student_model.bottleneck_classifier import BottleneckClassifier  # registers it with AutoModel...
from kd.nlp.student_model.cards import card_of, pipeline_tag, usage_of
from kd.nlp.student_model.inputs import Inputs
from kd.nlp.student_model.words import word_logits
from kd.nlp.teacher_model.teacher import labels_of, load_trained

Logits = dict[str, np.ndarray]  # (texts, classes) by split
Evaluation = tuple[dict[str, Any], Logits]  # an entry of results.json, and the logits


def trainer_metrics(data: TextData) -> Callable[[EvalPrediction], dict[str, float]]:
    """`compute_metrics` of a transformers Trainer."""
    return lambda found: data.scores.metrics(np.asarray(found.predictions), np.asarray(found.label_ids))


def evaluate(name: str, model: PreTrainedModel, texts: Texts, teacher_logits: Logits | None = None) -> Evaluation:
    """A model's entry in results.json, and its logits. The entry has the agreement with `teacher_logits`."""
    logits = predict_splits(model, texts)
    metrics = metrics_by_split(texts, logits, teacher_logits)
    return {"name": name, **cost(model, median_text(texts, model.device)), "metrics": metrics}, logits


def predict_splits(model: Any, texts: Texts) -> Logits:
    """Logits of every split but train."""
    names = texts.data.label_names
    outside = names.index(OUTSIDE) if OUTSIDE in names else 0
    splits = {split: rows for split, rows in texts.splits.items() if split != "train"}
    return {split: predict(model, rows, texts.collate, outside) for split, rows in splits.items()}


def predict(model: PreTrainedModel, rows: Dataset, collate: Collate, outside: int = 0) -> np.ndarray:
    """Logits (texts, classes) of all rows, or (texts, words, tags) for token_classification; see `word_logits`. Always
    in fp32, the precision of a model that a user loads.
    """

    def call(**batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": model(**batch).logits.float()}

    logits = run_inference(model, call, rows, collate, description="evaluating")["logits"]
    if "first_tokens" in rows.column_names:
        return word_logits(logits, rows["first_tokens"][:], outside)
    return torch.stack(logits).numpy()


def metrics_by_split(
    texts: Texts, logits: Logits, teacher_logits: Logits | None = None
) -> dict[str, dict[str, float]]:
    """The metrics of the logits by split, including the calibration and the agreement with `teacher_logits`.

    If the data have out-of-scope texts, or several labels per text, this includes metrics with a threshold. It is
    chosen on the first validation split; without a validation split there is none.
    """
    scores = texts.data.scores
    labels = {split: texts.labels(split) for split in logits}
    chosen_on = next((split for split in logits if split.startswith("validation")), None)
    threshold = scores.choose_threshold(logits[chosen_on], labels[chosen_on]) if chosen_on else None
    metrics = {}
    for split, values in logits.items():
        metrics[split] = scores.metrics(values, labels[split]) | scores.calibration(values, labels[split])
        if threshold is not None:
            metrics[split] |= scores.threshold_metrics(values, labels[split], threshold)
        if teacher_logits is not None:
            metrics[split]["agreement"] = scores.agreement(values, teacher_logits[split], labels[split])
    return metrics


def measure(texts: Texts, logits: Logits) -> Measurement:
    """The measurement of the primary metric on the first validation split."""
    data, split = texts.data, validation_split(texts.splits)
    return data.scores.measure(logits[split], texts.labels(split), data.primary_metric)


def measure_columns(texts: Texts) -> dict[str, Measurement]:
    """The measurement of the teacher in the columns of the data, if all rows have an output."""
    split = validation_split(texts.splits)
    if "teacher" not in texts.data.splits[split].column_names:
        return {}
    logits = column_array(texts.data.splits[split], "teacher")
    return {"teacher": measure(texts, {split: logits})} if has_output(logits).all() else {}


def chance_warning(entry: dict[str, Any], texts: Texts) -> str | None:
    """A warning if a teacher, by its entry in results.json, is no better than chance on validation."""
    data, split = texts.data, validation_split(texts.splits)
    metrics, labels = entry["metrics"][split], texts.labels(split)
    return data.scores.warning(entry["name"], metrics, labels, data.primary_metric, split)


def validation_split(splits: Iterable[str]) -> str:
    """The first validation split: MNLI has two."""
    return next(name for name in splits if name.startswith("validation"))


def median_text(texts: Texts, device: torch.device) -> dict[str, torch.Tensor]:
    """The inputs of a text of median length, for measuring latency and FLOPs. It comes from the first validation
    split, or from the last split if there is none.
    """
    splits = texts.splits
    rows = next((rows for split, rows in splits.items() if split.startswith("validation")), [*splits.values()][-1])
    middle = int(np.argsort(column_array(rows, "length"), kind="stable")[len(rows) // 2])
    return {name: t.to(device) for name, t in texts.collate([rows[middle]]).items() if name not in NOT_INPUTS}


# ---- the report of a run ----


def evaluate_teacher(
    run: TrainerRun, inputs: Inputs, teacher: PreTrainedModel, name: str, matching: MatchingArguments | None = None
) -> Evaluation:
    """Evaluates the teacher. With --ensemble_teachers, evaluates the mean logits of all teachers and sums their costs.
    Warns about each teacher that is no better than chance.
    """
    ensemble = matching.ensemble_teachers if matching else []
    texts = inputs.texts
    evaluations = [evaluate(name, teacher, texts)]
    for other_name, other in zip(ensemble, inputs.ensemble, strict=True):
        evaluations.append(evaluate(other_name, other.model, Texts.of(inputs.data, other.tokenizer)))
    for entry, _ in evaluations:
        run.warn(chance_warning(entry, texts))
    if matching is None or not ensemble:
        return evaluations[0]
    logits = {
        split: np.average([logits[split] for _, logits in evaluations], axis=0, weights=matching.ensemble_weights)
        for split in evaluations[0][1]
    }
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
    teacher: PreTrainedModel | None,
    teacher_results: Evaluation | None,
    control: PreTrainedModel | None = None,
    student: PreTrainedModel | None = None,
    **others: Any,
) -> dict[str, Any] | None:
    """Evaluates control and student, writes the report and the student's folder, and prints the table. Returns the
    results in the main process, None in the others.

    `teacher` is None if its outputs come from the data, control and student if the run has none; `others` are further
    entries of the results.
    """
    entry, logits = teacher_results or (None, None)
    models: dict[str, Any] = {"teacher": entry, "control": None}
    measurements = {} if logits is None else {"teacher": measure(inputs.texts, logits)}
    measurements |= measure_columns(inputs.texts)
    size = student_name or f"{inputs.student_layers} layers"
    for role, model, trained_by in (("control", control, "labels only"), ("student", student, method)):
        if model is not None:
            models[role], predicted = evaluate(f"{size}, {trained_by}", model, inputs.student_texts, logits)
            measurements[role] = measure(inputs.student_texts, predicted)
    if not PartialState().is_main_process:
        return None
    trained = {"teacher": teacher, "control": control, "student": student}
    # The runs of distill_glue.py share other stages, and those of train_teacher.py none.
    teacher_is_shared = run.shared == run.folder / ".." and student is not None
    extra: dict[str, Any] = {"shared_by_all_seeds": "the teacher"} if teacher_is_shared else {}
    extra |= others
    with_bottleneck = {role: model for role, model in trained.items() if isinstance(model, BottleneckClassifier)}
    if with_bottleneck:
        extra["keys"] = {role: model.config.key_statistics for role, model in with_bottleneck.items()}
        extra["bytes"] = {role: sizes(model) for role, model in with_bottleneck.items()}
    results = _results(run, inputs, method, models, measurements=measurements, **extra)
    data = inputs.data
    usage = usage_of(student, "text_pair" in data.splits["train"].column_names, data.task)
    card = card_of(run, usage, pipeline_tag(data.task), KNOWN)
    run.finish(results, student, card, inputs.student_texts.collate.tokenizer)
    return results


def _results(run: TrainerRun, inputs: Inputs, method: str, models: dict[str, Any], **extra: Any) -> dict[str, Any]:
    data = inputs.data
    sizes = {name: len(rows) for name, rows in inputs.texts.splits.items()}
    split, metric = validation_split(inputs.texts.splits), data.primary_metric
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
        chance=data.scores.chance(inputs.texts.labels(split), metric),
        selection=run.args.selection,
        data_notes="; ".join(data.notes) or "none",
        model_notes="; ".join(inputs.notes) or "none",
        **extra,
    )


# ---- evaluation of a saved classifier ----


def load_data_of(model: str, args: Namespace) -> TextData:
    """The data that the flags name, with the class ids of `model` (folder or Hub name). No train split is needed.
    Prints what was inferred. Raises UserError if the data have labels that `model` lacks.
    """
    kind, labels = labels_of(model)
    data = load_text_data(
        args.dataset,
        args.text_columns,
        args.label_column,
        kind,
        labels or args.label_names,
        needs_train=False,
        max_eval_samples=args.max_eval_samples,
        unlabelled_label=args.unlabelled_label,
        label_names=args.label_names,
        trust_label_order=args.trust_label_order,
        label_separator=args.label_separator,
    )
    print_notes(data.name, data.notes)
    return data


def evaluate_classifier(name: str, args: Namespace) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The entry of the classifier NAME for the data that the flags name, and the columns of `write_predictions`."""
    data = load_data_of(name, args)
    classifier = load_trained(name, data)
    texts = Texts.of(data, classifier.tokenizer)
    entry, logits = evaluate(name, classifier.model, texts)
    return entry, prediction_columns(texts, logits)


def prediction_columns(texts: Texts, logits: Logits) -> dict[str, dict[str, Any]]:
    """The columns of `write_predictions` by split. `row` is the row of the split, or that of train if the split was
    set aside from it.
    """
    data, columns = texts.data, {}
    for split, scores in logits.items():
        found: dict[str, Any]
        rows, labels = data.splits[split], texts.labels(split)
        if data.task == "regression":
            found = {"label": labels.tolist(), "prediction": scores.reshape(-1).tolist()}
        elif data.task == "classification":
            found = class_predictions(scores, labels, data.label_names)
        else:
            found = {"label": _listed(data, None, labels), "prediction": _listed(data, scores, labels)}
        columns[split] = {"row": rows["row"][:]} | found
    return columns


def _listed(data: TextData, logits: np.ndarray | None, labels: np.ndarray) -> list[str]:
    """The labels of each text, with semicolons, or the tags of its words, with spaces: predicted, or without `logits`
    actual.
    """
    names = np.array(data.label_names)
    if data.task == "multi_label":
        chosen = labels > 0 if logits is None else predict_labels(logits)
        return ["; ".join(names[row]) for row in chosen]
    tags = labels if logits is None else logits.argmax(axis=-1)
    return [" ".join(names[row[known != IGNORED]]) for row, known in zip(tags, labels, strict=True)]
