"""The report of a run: report.md and the printed table."""

import shlex
from pathlib import Path
from typing import Any

from kd.common.reporting.plots import plot_curves
from kd.common.reporting.results import RESULTS, Results, Schema, primary_score, useless_teacher, validate
from kd.common.reporting.tables import escaped, fenced, markdown, number, percent, print_rich, si, words
from kd.common.utils.files import write_json, write_text

Table = tuple[list[str], list[list[str]]]  # header and rows
ONE_SEED = " (one seed)"  # at the end of the word of a verdict


def write_report(
    folder: str | Path, results: Results, history: dict[str, list[dict[str, Any]]] | None, progress: str = "epoch"
) -> None:
    """Writes curves.png, report.md and, last, results.json, which marks a run as finished.

    `history` maps a stage (teacher, control, student) to its log, whose curves are drawn over `progress`; None
    draws no curves.
    """
    validate(results)
    folder = Path(folder)
    if history is not None:
        plot_curves(folder / "curves.png", history, results, progress)
    write_text(folder / "report.md", _report(results))
    write_json(folder / RESULTS, results)


def print_table(results: Results) -> None:
    """Prints the table of the models and the headline of a run."""
    header, rows = model_table(results)
    printed = results.get("warnings", [])  # when they occurred
    warnings = [f"Warning: {text}" for text in warnings_of(results) if text not in printed]
    print_rich(header[:-1], [row[:-1] for row in rows], title(results), "\n".join([*_sentences(results), *warnings]))


# ---------------------------------------------------------------- report.md


def _report(results: Results) -> str:
    sections = [
        f"# {escaped(title(results))}",
        escaped(headline(results)),
        *(f"**Warning:** {escaped(text)}" for text in warnings_of(results)),
        markdown(*model_table(results)),
        _curves(results),
        "## All metrics",
        markdown(*metric_table(results)),
        *_extra_sections(results),
        "## How to reproduce it",
        fenced(shlex.join(results["command"])),
        f"{_seeds(results)} {samples(results)} Data fingerprint `{results['data']['fingerprint']}`.",
        markdown(*_values(results["seconds"], "stage", "seconds")),
        markdown(*_values(results["environment"], "environment", "")),
    ]
    return "\n\n".join(sections) + "\n"


def _curves(results: Results) -> str:
    if "seeds" in results:
        return "Curves: " + ", ".join(f"[seed {seed}](seed{seed}/curves.png)" for seed in results["seeds"])
    return "![Training losses and evaluation metric](curves.png)"


def _seeds(results: Results) -> str:
    if "seeds" in results:
        return f"Mean ± standard deviation over the seeds {', '.join(map(str, results['seeds']))}."
    return f"Seed {results['seed']}."


def samples(results: Results) -> str:
    sizes, units = results["data"], results["data"].get("units", {})
    splits = [split for split in ("train", "validation", "test") if sizes[split] is not None]
    parts = [f"{split} {sizes[split]:,} {units.get(split, '')}".strip() for split in splits]
    return f"{'Data' if units else 'Samples'}: {', '.join(parts)}."


def model_table(results: Results) -> Table:
    """A row for each model: score, size and speed."""
    models = {stage: model for stage, model in results["models"].items() if model}
    batches = ", ".join(str(batch) for batch in sorted({model["latency_ms"]["batch"] for model in models.values()}))
    header = [
        "model",
        "name",
        metric_name(results),
        "parameters",
        "MB",
        "FLOPs",
        f"ms (batch {batches})",
        "90th percentile",
    ]
    rows = []
    for stage, model in models.items():
        latency = [number(model["latency_ms"][key]) for key in ("median", "p90")]
        size = [f"{model['parameters']:,}", number(model["megabytes"]), si(model["flops"])]
        rows.append([words(stage), model["name"], score_text(results, stage), *size, *latency])
    return header, rows


def metric_table(results: Results) -> Table:
    """A row for each split and metric that a model has, a column for each model."""
    models = {stage: model["metrics"] for stage, model in results["models"].items() if model}
    splits = dict.fromkeys(split for metrics in models.values() for split in metrics)
    rows = [
        [split, words(name), *(number(metrics.get(split, {}).get(name)) for metrics in models.values())]
        for split in splits
        for name in dict.fromkeys(name for metrics in models.values() for name in metrics.get(split, {}))
    ]
    return ["split", "metric", *map(words, models)], rows


def _extra_sections(results: Results) -> list[str]:
    """Keys that are not in the schema: plain values, and sections {name: value} or {model: {name: value}}."""
    extra = {key: value for key, value in results.items() if key not in Schema.model_fields and _informs(value)}
    notes = {key: value for key, value in extra.items() if not isinstance(value, dict)}
    sections = ({"notes": notes} if notes else {}) | {key: value for key, value in extra.items() if key not in notes}
    texts = []
    for key, section in sections.items():
        heading = words(key)
        texts += [f"## {escaped(heading[0].upper() + heading[1:])}", markdown(*_section_table(section))]
    return texts


def _section_table(section: dict[str, Any]) -> Table:
    if not all(isinstance(values, dict) for values in section.values()):
        return _values(section, "", "value")
    names = dict.fromkeys(name for values in section.values() for name in values)
    rows = [[words(name), *(number(values.get(name)) for values in section.values())] for name in names]
    return ["", *map(words, section)], rows


def _values(values: dict[str, Any], *header: str) -> Table:
    return [*header], [[words(name), number(value)] for name, value in values.items() if _informs(value)]


def _informs(value: Any) -> bool:
    """Whether a value is included in the report: not 0, False, None, empty or "none"."""
    return bool(value) and value != "none"


# ---------------------------------------------------------------- sentences


def title(results: Results) -> str:
    return f"{results['domain']}: {results['task']}, {results['method']}"


def headline(results: Results) -> str:
    """The student's score compared with teacher, control and chance, and its size and speed."""
    return " ".join(_sentences(results))


def _sentences(results: Results) -> list[str]:
    if not results["models"]["student"]:
        return ["No student was trained."]
    score = score_text(results, "student")
    direction = " (lower is better)" if results.get("lower_is_better") else ""
    sentences = [f"The student reaches a {metric_name(results)} of {score}{direction}{_against_teacher(results)}."]
    control, gain = results["models"]["control"], results["gain_over_control"]
    if gain is not None:
        difference = f"the gain over it is {'+' if gain > 0 else ''}{number(gain)}"
        sentences.append(f"The control ({control['name']}) reaches {score_text(results, 'control')}: {difference}.")
    if results.get("chance") not in (None, results.get("floor")):
        sentences.append(f"Chance level is {number(results['chance'])}.")
    if results["models"]["teacher"]:
        sentences.append(_size(results))
    if verdict := verdict_sentence(results):
        sentences.append(verdict)
    return sentences


def verdict_sentence(results: Results) -> str | None:
    """The verdict in words; None where there is none."""
    verdict = results.get("verdict") or {}
    control, teacher = verdict.get("control"), verdict.get("teacher")
    parts = []
    if control:
        parts.append(f"{_compared(control)} the control ({_interval(control)})")
    for role, other in verdict.get("others", {}).items():
        parts.append(f"{_compared(other)} the {words(role)} model ({_interval(other)})")
    if teacher:
        parts.append(_not_worse(teacher, verdict.get("shared_teacher", True)))
    return f"Verdict: {'; '.join(parts)}." if parts else None


def _not_worse(verdict: dict[str, Any], shared: bool) -> str:
    teacher = "the teacher"
    if verdict["seeds"] > 1:
        teacher += " that all seeds share" if shared else " of the same seed"
    word = verdict["word"].removesuffix(ONE_SEED)
    if word != "better" and verdict["not_worse_by_margin"]:
        return f"not worse than {teacher} by more than {number(verdict['margin'])}"
    return f"{_compared(verdict)} {teacher} ({_interval(verdict)})"


def _compared(verdict: dict[str, Any]) -> str:
    word = verdict["word"].removesuffix(ONE_SEED)
    return "no difference shown to" if word == "no difference shown" else f"{word} than"


def _interval(verdict: dict[str, Any]) -> str:
    seeds = "one seed" if verdict["seeds"] == 1 else f"{verdict['seeds']} seeds"
    gain = f"gain {number(verdict['gain'])}"
    if verdict["interval"] is None:
        return f"{gain}, {seeds}, {verdict['method']}"
    low, high = map(number, verdict["interval"])
    return f"{gain}, {verdict['confidence']:.0%} interval {low} to {high}, {seeds}, {verdict['method']}"


def warnings_of(results: Results) -> list[str]:
    """The warnings of the run and of its verdict, each once."""
    return list(dict.fromkeys([*results.get("warnings", []), *(results.get("verdict") or {}).get("warnings", [])]))


def _against_teacher(results: Results) -> str:
    if primary_score(results, "teacher") is None:
        return ""
    score = score_text(results, "teacher")
    if reason := useless_teacher(results):
        return f"; the teacher's {score} is no better than {reason}" + ("'s" if reason == "the control" else "")
    if results["retention"] is None or results.get("lower_is_better"):
        return f"; the teacher's is {score}"
    share, floor = f"{results['retention']:.1%}", results.get("floor", 0.0)
    way = f"the way from {number(floor)} (no skill) to " if floor else ""
    interval = results.get("retention_interval")
    bounds = f" (95% interval {interval[0]:.1%} to {interval[1]:.1%})" if interval else ""
    return f", {share} of {way}the teacher's {score}{bounds}"


def _size(results: Results) -> str:
    teacher, student = results["models"]["teacher"], results["models"]["student"]
    size = student["parameters"] / max(teacher["parameters"], 1)
    seconds = student["latency_ms"]["median"] / max(teacher["latency_ms"]["median"], 1e-9)
    return f"The student has {percent(size)} of the teacher's parameters and {percent(seconds)} of its latency."


def metric_name(results: Results) -> str:
    return f"{results['primary_metric']['split']} {words(results['primary_metric']['name'])}"


def score_text(results: Results, stage: str) -> str:
    """The primary metric of a model, with its standard deviation over several seeds."""
    primary = results["primary_metric"]
    deviations = results.get("standard_deviations", {}).get("models", {}).get(stage, {})
    deviation = deviations.get(primary["split"], {}).get(primary["name"])
    return number(primary_score(results, stage)) + ("" if deviation is None else f" ± {number(deviation)}")
