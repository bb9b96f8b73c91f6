"""The model card of a student for the Hugging Face Hub, and the student's folder."""

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import EvalResult, ModelCardData

from kd.common.reporting.origins import (
    CARD,
    Licence,
    common_licence,
    describe_licence,
    hub_names,
    is_local,
    licence_of,
)
from kd.common.reporting.report import (
    headline,
    metric_name,
    metric_table,
    model_table,
    samples,
    score_text,
    verdict_sentence,
    warnings_of,
)
from kd.common.reporting.results import Results
from kd.common.reporting.tables import code, escaped, fenced, markdown, number, words
from kd.common.utils.files import write_text, writing_folder

TAG = "knowledge-distillation"
HUB_METRICS = {  # the metrics of the Hub, by ours; the others are in the card's tables alone
    **{name: name for name in ("accuracy", "f1", "mse", "perplexity", "bleu", "chrf")},
    "f1_macro": "f1",
    "matthews": "matthews_correlation",
    "pearson": "pearsonr",
    "return_mean": "mean_reward",
    "spearman": "spearmanr",
    "top5_accuracy": "accuracy",
}


class Savable(Protocol):
    """A transformers model, tokenizer or image processor, or any object with this method."""

    def save_pretrained(self, save_directory: Any) -> Any: ...


@dataclass(frozen=True)
class Card:
    """The part of a model card that does not depend on the results of a run.

    usage: The Python code that loads and calls the student, from a variable `folder` that it sets.
    library_name, pipeline_tag: Entries of the metadata.
    dataset: The dataset owner/name[:config] of the Hub; None for other data.
    origins: Names of the pretrained models on which the student depends, on the Hub or of local files: the one that it
        started from, if any, then its teachers.
    licence: Their licence, if no card of theirs states one.
    tags: More tags.
    training: How the student was trained, in a few words; by default from the results.
    """

    usage: str
    library_name: str | None = None
    pipeline_tag: str | None = None
    dataset: str | None = None
    origins: list[str] = field(default_factory=list)
    licence: str | None = None
    tags: list[str] = field(default_factory=list)
    training: str | None = None


def save_student(
    folder: Path, student: Savable, results: Results, card: Card, processor: Savable | None = None
) -> None:
    """Writes a student, its `processor` and its model card, atomically."""
    with writing_folder(folder) as partial:
        for part in (student, processor):
            if part is not None:
                part.save_pretrained(partial)
        write_text(partial / CARD, model_card(results, card))


def model_card(results: Results, card: Card) -> str:
    """The README.md of a student. It contains no local path, and shows names that contain markup as they are."""
    results = without_local_paths(results, card.origins)
    licences = {name: licence_of(name) or {"license": card.licence} for name in card.origins}
    student, teacher, environment = results["models"]["student"], results["models"]["teacher"], results["environment"]
    source = f" from the teacher {code(teacher['name'])}" if teacher else ""
    if outputs := results.get("teacher_columns"):
        source = f" from the outputs of a teacher in the data ({escaped(outputs)})"
    training = f"distilled{source} with the method {code(results['method'])}"
    if results.get("labels_only"):
        training = "trained on the labels alone, as a control of distillation"
    training = card.training or training
    sections = [
        f"---\n{metadata(results, card, licences)}\n---",
        f"# {escaped(results['task'])}: {escaped(results['method'])}",
        f"{code(student['name'])}, a student of {student['parameters']:,} parameters for {escaped(results['task'])}, "
        f"{training}.",
        escaped(headline(results)),
        "## Load it",
        fenced(card.usage, "python"),
        *_requirements(card.usage),
        "## Results",
        markdown(*model_table(results)),
        markdown(*metric_table(results)),
        "## How it was trained",
        fenced(shlex.join(results["command"])),
        f"{samples(results)} Trained in {environment['precision']} on {escaped(environment['device'])} "
        f"({_counted(environment['threads'], 'thread')}) with torch {environment['torch']} in "
        f"{number(results['seconds']['total'])} seconds.",
        *_origins(licences),
        "## Limitations",
        "\n".join(f"- {escaped(line)}" for line in _limitations(results)),
    ]
    return "\n\n".join(sections) + "\n"


def with_seeds(card: str, first: Results, merged: Results) -> str:
    """The card of the first of several seeds, with a statement on all of them in place of the one on a single seed."""
    return card.replace(escaped(_seeds(first)), escaped(_seeds(merged)))


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _requirements(usage: str) -> list[str]:
    if not re.search(r"^(from|import) kd\.", usage, re.MULTILINE):
        return []
    return ["The code needs `kd`, the package of the project that trained this student."]


def _origins(licences: dict[str, Licence]) -> list[str]:
    """The section on the pretrained models and their licences, if there are any models."""
    if not licences:
        return []
    names = {name: _last_part(Path(name)) if is_local(name) else name for name in licences}
    lines = [f"- {code(names[name])}: {escaped(describe_licence(licence))}" for name, licence in licences.items()]
    if not common_licence(licences).get("license"):
        lines.append("- Their licences differ or are not known, so this card states none for the student.")
    return ["## Pretrained models", "\n".join(lines)]


def _limitations(results: Results) -> list[str]:
    split, gain = results["primary_metric"]["split"], results["gain_over_control"]
    student, teacher = results["models"]["student"], results["models"]["teacher"]
    lines = [_seeds(results), *warnings_of(results)]
    if results["data"][split] is not None:
        unit = results["data"].get("units", {}).get(split, "samples")
        lines.append(f"The headline is measured on {results['data'][split]:,} {unit} of the {split} split.")
    if "test" not in student["metrics"]:
        lines.append("It was not evaluated on a test split.")
    if teacher and results["retention"] is not None and results["retention"] < 1:
        scores = f"{score_text(results, 'student')} against {score_text(results, 'teacher')}"
        lines.append(f"It does not reach the {metric_name(results)} of its teacher: {scores}.")
    if gain is None:
        lines.append("Without a control, the effect of the teacher is not known.")
    elif gain <= 0:
        lines.append("The control, which was trained without the teacher, is as good or better.")
    batch, device = student["latency_ms"]["batch"], results["environment"]["device"]
    return [*lines, f"Latency was measured with batches of {batch} on {device}; other hardware differs."]


def _seeds(results: Results) -> str:
    if "seeds" not in results:
        return f"These are the results of one run, seed {results.get('seed')}: the variation over seeds is not known."
    seeds = ", ".join(map(str, results["seeds"]))
    scores = [f"{role} {score_text(results, role)}" for role, model in results["models"].items() if model]
    over_seeds = f"The {metric_name(results)}, mean ± standard deviation over the seeds {seeds}: {', '.join(scores)}."
    weights = f"The weights are those of seed {results['seeds'][0]}."
    return " ".join(filter(None, [over_seeds, verdict_sentence(results), weights]))


# ---------------------------------------------------------------- metadata


def metadata(results: Results, card: Card, licences: dict[str, Licence]) -> ModelCardData:
    """The metadata of a card for the Hub, with the metrics of validation and test as `model-index`.

    `licences`: Those of the pretrained models, by name.
    """
    based_on = list(dict.fromkeys(name for origin in card.origins for name in hub_names(origin)))
    evaluations = _evaluations(results, card)
    licence = common_licence(licences) or {"license": None}
    return ModelCardData(
        license=licence["license"],
        license_name=licence.get("license_name"),
        license_link=licence.get("license_link"),
        library_name=card.library_name,
        pipeline_tag=card.pipeline_tag,
        base_model=based_on or None,
        datasets=[card.dataset.partition(":")[0]] if card.dataset else None,
        metrics=list(dict.fromkeys(result.metric_type for result in evaluations)) or None,
        tags=[TAG, *card.tags],
        model_name=f"{_one_line(results['task'])} {_one_line(results['method'])}",
        eval_results=evaluations or None,
    )


def _evaluations(results: Results, card: Card) -> list[EvalResult]:
    hub_name, _, config = (card.dataset or "").partition(":")
    task = _one_line(results["task"])
    mean = f", mean over {len(results['seeds'])} seeds" if "seeds" in results else ""
    return [
        EvalResult(
            task_type=card.pipeline_tag or "other",
            dataset_type=hub_name or task,
            dataset_name=task,
            dataset_config=config or None,
            dataset_split=split,
            metric_type=HUB_METRICS[name],
            metric_name=words(name) + mean,
            metric_value=value,
        )
        for split, values in results["models"]["student"]["metrics"].items()
        for name, value in values.items()
        if name in HUB_METRICS and isinstance(value, int | float)
    ]


def _one_line(text: str) -> str:
    return " ".join(text.split())


# ---------------------------------------------------------------- paths


def without_local_paths(results: Results, names: list[str]) -> Results:
    """The results with only the last part of each local path that is in the command, a model's name or `names`. Of a
    script of the project, three parts remain.
    """
    models = [part for model in results["models"].values() if model for part in model["name"].split(" + ")]
    arguments = [word.partition("=")[2] if word.startswith("--") else word for word in results["command"]]
    found = {text for text in (*arguments, *models, *names) if "/" in text and (text[0] == "/" or is_local(text))}
    paths = {text: _last_part(Path(text)) for text in sorted(found, key=len, reverse=True)}
    public: Results = _replaced(results, paths)
    return public


def _last_part(path: Path) -> str:
    return "/".join(path.parts[-3:]) if path.parent.name == "scripts" else path.name or "folder"


def _replaced(value: Any, texts: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {name: _replaced(part, texts) for name, part in value.items()}
    if isinstance(value, list):
        return [_replaced(part, texts) for part in value]
    if isinstance(value, str):
        for text, replacement in texts.items():
            value = value.replace(text, replacement)
    return value
