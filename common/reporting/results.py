"""The results of one run: results.json and its schema, report.md, curves.png, a table."""

import json
import shlex
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from kd.common.reporting.plots import plot_curves
from kd.common.reporting.tables import markdown, number, print_rich, si
from kd.common.utils.files import write_json, write_text

Results = dict[str, Any]  # the content of results.json, as `Schema` describes it
RECIPE, RESULTS = "recipe.yaml", "results.json"  # a run has its recipe from its start on, its results at its end


# ---------------------------------------------------------------- the schema, version 1


class Latency(BaseModel):
    batch: int
    median: float
    p90: float


class ModelResults(BaseModel):
    name: str
    parameters: int
    megabytes: float  # of the weights
    flops: float | None  # of one forward pass of one sample
    latency_ms: Latency
    metrics: dict[str, dict[str, float | list[Any] | None]]  # split -> metric -> value, or an interval


class Models(BaseModel, extra="allow"):
    __pydantic_extra__: dict[str, ModelResults | None]
    teacher: ModelResults | None
    control: ModelResults | None
    student: ModelResults | None


class Data(BaseModel):  # numbers of samples
    train: int | None
    validation: int | None
    test: int | None
    fingerprint: str


class PrimaryMetric(BaseModel):
    split: str
    name: str


class Seconds(BaseModel):
    teacher: float | None
    teacher_outputs: float | None
    control: float | None
    student: float | None
    total: float


class Environment(BaseModel):
    python: str
    torch: str
    device: str
    threads: int
    precision: str
    git_commit: str | None


class Schema(BaseModel):
    """results.json; more keys are allowed everywhere.

    One run has a `seed`. Several of one command have `seeds`, means as figures, and `standard_deviations`
    (`comparison.over_seeds`).
    """

    schema_version: Literal[1]
    domain: str
    task: str
    method: str
    command: list[str]
    data: Data
    models: Models
    primary_metric: PrimaryMetric
    # (student - floor) / (teacher - floor) of the primary metric, teacher / student where lower is better
    retention: float | None
    gain_over_control: float | None  # student - control, the inverse likewise: more is better
    seconds: Seconds
    environment: Environment
    seed: int | None = None
    seeds: list[int] | None = None
    standard_deviations: dict[str, Any] | None = None
    warnings: list[str] = []


def validate(results: Results) -> None:
    """Raises ValueError, one line that names the place, unless `results` follows Schema and is finite."""
    try:
        Schema.model_validate(results, strict=True)
    except ValidationError as errors:
        error = errors.errors()[0]
        place = ".".join(["results", *map(str, error["loc"])])
        wrong = f"{place} is {error['input']!r}: {error['msg']}"
        raise ValueError(f"missing key {place}" if error["type"] == "missing" else wrong) from None
    if results.get("seed") is None and results.get("seeds") is None:
        raise ValueError("missing key results.seed, or results.seeds of several runs")
    split, name = results["primary_metric"]["split"], results["primary_metric"]["name"]
    for role, model in results["models"].items():
        metrics, place = model and model["metrics"], f"results.models.{role}.metrics"
        if model and split not in metrics:
            raise ValueError(f"missing key {place}.{split}")
        if model and not isinstance(metrics[split].get(name), int | float):
            raise ValueError(f"missing key {place}.{split}.{name}, a number")
    for figure, others in (("retention", ("teacher", "student")), ("gain_over_control", ("control", "student"))):
        if results[figure] is not None and any(results["models"][role] is None for role in others):
            raise ValueError(f"results.{figure} must be null where models.{' or models.'.join(others)} is")
    json.dumps(results, allow_nan=False)


# ---------------------------------------------------------------- one run


def write_report(
    folder: str | Path, results: Results, history: dict[str, list[dict[str, Any]]] | None, progress: str = "epoch"
) -> None:
    """Writes curves.png, report.md and, last, results.json: a run that has it is finished.

    `history` maps a stage (teacher, control, student) to its log, whose curves are drawn over `progress`; None:
    without curves.
    """
    validate(results)
    folder = Path(folder)
    if history is not None:
        plot_curves(folder / "curves.png", history, results, progress)
    write_text(folder / "report.md", _report(results))
    write_json(folder / RESULTS, results)


def print_table(results: Results) -> None:
    """Prints the results of a run: a table of the models, then retention and gain over the control."""
    print_rich(*model_table(results), title=title(results), below=headline(results))


def show_metrics(name: str, entry: dict[str, Any], path: str | None) -> None:
    """Prints the metrics of a model's entry in results.json; writes the entry to `path` if there is one."""
    rows = [
        [split, metric, f"{value:.6f}" if isinstance(value, float) else number(value)]
        for split, values in entry["metrics"].items()
        for metric, value in values.items()
    ]
    print_rich(["split", "metric", "value"], rows, title=name)
    if path:
        write_json(path, entry)


def _report(results: Results) -> str:
    sections = [
        f"# {title(results)}",
        headline(results),
        *(f"**Warning:** {text}" for text in results.get("warnings", [])),
        markdown(*model_table(results)),
        _curves(results),
        "## All metrics",
        markdown(*metric_table(results)),
        *_extra_sections(results),
        "## How it was made",
        f"```\n{shlex.join(results['command'])}\n```",
        f"{seed_sentence(results)} {data_sentence(results)} Data fingerprint `{results['data']['fingerprint']}`.",
        markdown(["stage", "seconds"], [[stage, number(value)] for stage, value in results["seconds"].items()]),
        markdown(["environment", ""], [[key, number(value)] for key, value in results["environment"].items()]),
    ]
    return "\n\n".join(sections) + "\n"


# ---------------------------------------------------------------- sentences and tables


def title(results: Results) -> str:
    return f"{results['domain']}: {results['task']}, {results['method']}"


def primary_score(results: Results, stage: str) -> float | None:
    model, primary = results["models"][stage], results["primary_metric"]
    return model["metrics"][primary["split"]][primary["name"]] if model else None


def shown_score(results: Results, stage: str) -> str:
    """The primary metric of a model, with its standard deviation over several seeds."""
    primary = results["primary_metric"]
    deviations = results.get("standard_deviations", {}).get("models", {}).get(stage, {})
    deviation = deviations.get(primary["split"], {}).get(primary["name"])
    return number(primary_score(results, stage)) + ("" if deviation is None else f" ± {number(deviation)}")


def seed_sentence(results: Results) -> str:
    if "seeds" in results:
        return f"Mean ± standard deviation over the seeds {', '.join(map(str, results['seeds']))}."
    return f"Seed {results['seed']}."


def _curves(results: Results) -> str:
    if "seeds" in results:
        return "Curves: " + ", ".join(f"[seed {seed}](seed{seed}/curves.png)" for seed in results["seeds"])
    return "![Training loss and evaluation metric](curves.png)"


def headline(results: Results) -> str:
    primary, models = results["primary_metric"], results["models"]
    student, teacher = models["student"], models["teacher"]
    if not student:
        return "No student was trained."
    text = f"The student reaches a {primary['split']} {primary['name']} of {shown_score(results, 'student')}"
    if results["retention"] is not None:
        smaller = teacher["parameters"] / max(student["parameters"], 1)
        faster = teacher["latency_ms"]["median"] / max(student["latency_ms"]["median"], 1e-9)
        text += (
            f", {retained(results)}. "
            f"It has 1/{smaller:.1f} of the teacher's parameters and runs {faster:.1f} times as fast"
        )
    if results["gain_over_control"] is not None:
        gain = results["gain_over_control"]
        text += (
            f". The control ({models['control']['name']}) reaches {shown_score(results, 'control')}: "
            f"the gain over it is {'+' if gain > 0 else ''}{number(gain)}"
        )
    return text + "."


def retained(results: Results) -> str:
    """The retention in words: a share of the teacher's score or, with a `floor`, of the way from there to it."""
    floor = results.get("floor", 0.0)
    whole = f"the way from {number(floor)}, no skill at all, to the teacher's" if floor else "the teacher's"
    return f"{results['retention']:.1%} of {whole} {number(primary_score(results, 'teacher'))}"


def model_table(results: Results) -> tuple[list[str], list[list[str]]]:
    primary = results["primary_metric"]
    models = {stage: model for stage, model in results["models"].items() if model}
    batches = ", ".join(str(batch) for batch in sorted({model["latency_ms"]["batch"] for model in models.values()}))
    header = ["model", "name", f"{primary['split']} {primary['name']}", "parameters", "MB", "FLOPs"]
    header += [f"latency in ms (batch {batches}), median", "90 %"]
    rows = []
    for stage, model in models.items():
        latency = [number(model["latency_ms"][key]) for key in ("median", "p90")]
        size = [f"{model['parameters']:,}", number(model["megabytes"]), si(model["flops"])]
        rows.append([stage, model["name"], shown_score(results, stage), *size, *latency])
    return header, rows


def metric_table(results: Results) -> tuple[list[str], list[list[str]]]:
    models = {stage: model["metrics"] for stage, model in results["models"].items() if model}
    places = dict.fromkeys(
        (split, name) for splits in models.values() for split, values in splits.items() for name in values
    )
    rows = [
        [split, name, *(number(splits.get(split, {}).get(name)) for splits in models.values())]
        for split, name in places
    ]
    return ["split", "metric", *models], rows


def _extra_sections(results: Results) -> list[str]:
    """Keys beyond the schema, which scripts add: plain values, or sections {name: value} or {model: {name: value}}."""
    extra = {key: value for key, value in results.items() if key not in Schema.model_fields}
    plain = {key: value for key, value in extra.items() if not isinstance(value, dict)}
    sections = {"Notes": plain} if plain else {}
    sections |= {key: value for key, value in extra.items() if isinstance(value, dict)}
    texts = []
    for key, section in sections.items():
        texts += [f"## {key.replace('_', ' ').capitalize()}", markdown(*_section_table(section))]
    return texts


def _section_table(section: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    if not all(isinstance(values, dict) for values in section.values()):
        return ["", "value"], [[name, number(value)] for name, value in section.items()]
    names = dict.fromkeys(name for values in section.values() for name in values)
    return ["", *section], [[name, *(number(values.get(name)) for values in section.values())] for name in names]


def data_sentence(results: Results) -> str:
    sizes = [f"{split} {number(results['data'][split])}" for split in ("train", "validation", "test")]
    return f"Samples: {', '.join(sizes)}."


def environment_sentence(results: Results) -> str:
    environment = results["environment"]
    return (
        f"Computed in {environment['precision']} on {environment['device']} ({environment['threads']} threads) "
        f"with torch {environment['torch']} in {number(results['seconds']['total'])} seconds."
    )
