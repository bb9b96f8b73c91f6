"""What one run has to show: results.json, report.md, curves.png, a table."""

import json
import shlex
from pathlib import Path
from typing import Any

from kd.common.reporting.plots import plot_curves
from kd.common.reporting.tables import markdown, number, print_rich, si
from kd.common.utils.files import write_json, write_text

Results = dict[str, Any]
RECIPE, RESULTS = "recipe.yaml", "results.json"  # a run has its recipe from its start on, its results at its end


class Nullable(dict[Any, Any]):
    """A part of the schema whose value may be null as a whole."""


NUMBER = int | float
MODEL = {
    "name": str,
    "parameters": int,
    "megabytes": NUMBER,  # of the weights
    "flops": NUMBER | None,  # of one forward pass of one sample
    "latency_ms": {"batch": int, "median": NUMBER, "p90": NUMBER},
    "metrics": {str: {str: NUMBER | list | None}},  # split -> metric -> value, or several values (an interval)
}
# results.json, version 1; more keys are allowed everywhere, and `str` as a key stands for any name. One run has a
# `seed`; several of one command have `seeds`, means as figures, and `standard_deviations` (reporting/seeds.py).
SCHEMA = {
    "schema_version": int,
    "domain": str,
    "task": str,
    "method": str,
    "command": list,
    "data": {"train": int | None, "validation": int | None, "test": int | None, "fingerprint": str},  # samples
    "models": {"teacher": Nullable(MODEL), "control": Nullable(MODEL), "student": Nullable(MODEL)},
    "primary_metric": {"split": str, "name": str},
    # (student - floor) / (teacher - floor) of the primary metric, teacher / student where lower is better
    "retention": NUMBER | None,
    "gain_over_control": NUMBER | None,  # student - control, the inverse likewise: more is better
    "seconds": {
        "teacher": NUMBER | None,
        "teacher_outputs": NUMBER | None,
        "control": NUMBER | None,
        "student": NUMBER | None,
        "total": NUMBER,
    },
    "environment": {
        "python": str,
        "torch": str,
        "device": str,
        "threads": int,
        "precision": str,
        "git_commit": str | None,
    },
}


# ---------------------------------------------------------------- one run


def validate(results: Results) -> None:
    """Raises ValueError, naming the place, unless `results` follows SCHEMA and is finite."""
    _check(results, SCHEMA, "results")
    if results["schema_version"] != 1:
        raise ValueError(f"results.schema_version is {results['schema_version']}, this is version 1")
    if not isinstance(results.get("seed"), int) and not isinstance(results.get("seeds"), list):
        raise ValueError("missing key results.seed, an integer, or results.seeds, a list")
    split, name = results["primary_metric"]["split"], results["primary_metric"]["name"]
    for stage, model in results["models"].items():
        _check(model, Nullable(MODEL | {"metrics": {split: {name: NUMBER}}}), f"results.models.{stage}")
    for figure, others in (("retention", ("teacher", "student")), ("gain_over_control", ("control", "student"))):
        if results[figure] is not None and any(results["models"][stage] is None for stage in others):
            raise ValueError(f"results.{figure} must be null where models.{' or models.'.join(others)} is")
    json.dumps(results, allow_nan=False)


def _check(value: Any, schema: Any, where: str) -> None:
    if isinstance(schema, Nullable) and value is None:
        return
    if not isinstance(schema, dict):
        if not isinstance(value, schema):
            raise ValueError(f"{where} is {value!r}, must be {getattr(schema, '__name__', schema)}")
        return
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {value!r}, must be a dictionary")
    for key, part in schema.items():
        for name in value if key is str else [key]:
            if name not in value:
                raise ValueError(f"missing key {where}.{name}")
            _check(value[name], part, f"{where}.{name}")


def write_report(
    folder: str | Path, results: Results, history: dict[str, list[dict[str, Any]]] | None, progress: str = "epoch"
) -> None:
    """Writes curves.png, report.md and, last, results.json: a run that has it is finished.

    `history` maps a stage (teacher, control, student) to its log, whose curves are drawn over `progress`; None: there
    are no curves.
    """
    validate(results)
    folder = Path(folder)
    if history is not None:
        plot_curves(folder / "curves.png", history, results, progress)
    write_text(folder / "report.md", _report(results))
    write_json(folder / RESULTS, results)


def print_table(results: Results) -> None:
    """Prints what a run achieved: a table of the models, then retention and gain over the control."""
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


# ---------------------------------------------------------------- words and tables


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
    """The retention in words: a share of the teacher's score or, where no skill at all does not score 0, of the way
    there.
    """
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
    """What a script adds beyond the schema: plain values, or sections {name: value} or {model: {name: value}}."""
    shown = {*SCHEMA, "seed", "seeds", "standard_deviations", "warnings"}
    extra = {key: value for key, value in results.items() if key not in shown}
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
