"""What a run has to show: results.json, report.md, curves.png, a table, a model card; and several runs side by side.

    python -m common.report runs/NLP/seed0 runs/NLP/seed1 --markdown comparison.md --csv comparison.csv

groups runs by domain, task and method and prints mean, standard deviation and number of seeds.
"""

import csv
import io
import json
import shlex
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.cli import Parser, run
from common.plots import plot_curves
from common.utils.errors import UserError
from common.utils.files import read_json, write_json, write_text

Results = dict[str, Any]


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
SCHEMA = {  # results.json, version 1; more keys are allowed everywhere, and `str` as a key stands for any name
    "schema_version": int,
    "domain": str,
    "task": str,
    "method": str,
    "seed": int,
    "command": list,
    "data": {"train": int | None, "validation": int | None, "test": int | None, "fingerprint": str},  # samples
    "models": {"teacher": Nullable(MODEL), "control": Nullable(MODEL), "student": Nullable(MODEL)},
    "primary_metric": {"split": str, "name": str},
    "retention": NUMBER | None,  # student / teacher, of the primary metric
    "gain_over_control": NUMBER | None,  # student - control
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


def write_report(folder: str | Path, results: Results, history: dict[str, list[dict[str, Any]]]) -> None:
    """Writes curves.png, report.md and, last, results.json: a run that has it is finished.

    `history` maps a stage (teacher, control, student) to the `state.log_history` of its transformers.Trainer.
    """
    validate(results)
    folder = Path(folder)
    plot_curves(folder / "curves.png", history, results)
    write_text(folder / "report.md", _report(results))
    write_json(folder / "results.json", results)


def print_table(results: Results) -> None:
    """Prints what a run achieved: a table of the models, then retention and gain over the control."""
    _print_rich(*_model_table(results), title=_title(results), below=_headline(results))


def model_card(results: Results, title: str, usage: str, license: str = "mit", **metadata: Any) -> str:
    """README.md of a student for the Hugging Face Hub.

    `usage` is the Python code that loads and calls the student; `metadata` are more entries of the YAML header
    (library_name, pipeline_tag, base_model, datasets).
    """
    metrics = [results["primary_metric"]["name"]]
    front = {"license": license, "tags": ["knowledge-distillation"], "metrics": metrics} | metadata
    student = results["models"]["student"]
    teacher = results["models"]["teacher"]
    origin = f" from the teacher `{teacher['name']}`" if teacher else ""
    return f"""---
{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---

# {title}

`{student["name"]}`, a student of {student["parameters"]:,} parameters for {results["task"]}, distilled{origin} with
the method `{results["method"]}`. {_headline(results)}

## Load it

```python
{usage.strip()}
```

## Results

{_markdown(*_model_table(results))}

{_markdown(*_metric_table(results))}

## How it was trained

```
{shlex.join(results["command"])}
```

{_data_sentence(results)} {_environment_sentence(results)}

## Limitations

{_bullets(_limitations(results))}
"""


def _report(results: Results) -> str:
    sections = [
        f"# {_title(results)}",
        _headline(results),
        _markdown(*_model_table(results)),
        "![Training loss and evaluation metric per epoch](curves.png)",
        "## All metrics",
        _markdown(*_metric_table(results)),
        *_extra_sections(results),
        "## How it was made",
        f"```\n{shlex.join(results['command'])}\n```",
        f"Seed {results['seed']}. {_data_sentence(results)} Data fingerprint `{results['data']['fingerprint']}`.",
        _markdown(["stage", "seconds"], [[stage, _number(value)] for stage, value in results["seconds"].items()]),
        _markdown(["environment", ""], [[key, _number(value)] for key, value in results["environment"].items()]),
    ]
    return "\n\n".join(sections) + "\n"


# ---------------------------------------------------------------- words and tables


def _title(results: Results) -> str:
    return f"{results['domain']}: {results['task']}, {results['method']}"


def _primary(results: Results, stage: str) -> float | None:
    model, primary = results["models"][stage], results["primary_metric"]
    return model["metrics"][primary["split"]][primary["name"]] if model else None


def _headline(results: Results) -> str:
    primary, models = results["primary_metric"], results["models"]
    student, teacher = models["student"], models["teacher"]
    if not student:
        return "No student was trained."
    text = f"The student reaches a {primary['split']} {primary['name']} of {_number(_primary(results, 'student'))}"
    if results["retention"] is not None:
        smaller = teacher["parameters"] / max(student["parameters"], 1)
        faster = teacher["latency_ms"]["median"] / max(student["latency_ms"]["median"], 1e-9)
        text += (
            f", {results['retention']:.1%} of the teacher's {_number(_primary(results, 'teacher'))}. "
            f"It has 1/{smaller:.1f} of the teacher's parameters and runs {faster:.1f} times as fast"
        )
    if results["gain_over_control"] is not None:
        gain = results["gain_over_control"]
        text += (
            f". The same student trained without the teacher reaches {_number(_primary(results, 'control'))}: "
            f"the gain over this control is {'+' if gain > 0 else ''}{_number(gain)}"
        )
    return text + "."


def _model_table(results: Results) -> tuple[list[str], list[list[str]]]:
    primary = results["primary_metric"]
    models = {stage: model for stage, model in results["models"].items() if model}
    batches = ", ".join(str(batch) for batch in sorted({model["latency_ms"]["batch"] for model in models.values()}))
    header = ["model", "name", f"{primary['split']} {primary['name']}", "parameters", "MB", "FLOPs"]
    header += [f"latency in ms (batch {batches}), median", "90 %"]
    rows = []
    for stage, model in models.items():
        latency = [_number(model["latency_ms"][key]) for key in ("median", "p90")]
        size = [f"{model['parameters']:,}", _number(model["megabytes"]), _si(model["flops"])]
        rows.append([stage, model["name"], _number(_primary(results, stage)), *size, *latency])
    return header, rows


def _metric_table(results: Results) -> tuple[list[str], list[list[str]]]:
    models = {stage: model["metrics"] for stage, model in results["models"].items() if model}
    places = dict.fromkeys(
        (split, name) for splits in models.values() for split, values in splits.items() for name in values
    )
    rows = [
        [split, name, *(_number(splits.get(split, {}).get(name)) for splits in models.values())]
        for split, name in places
    ]
    return ["split", "metric", *models], rows


def _extra_sections(results: Results) -> list[str]:
    """What a script adds beyond the schema: plain values, or sections {name: value} or {model: {name: value}}."""
    extra = {key: value for key, value in results.items() if key not in SCHEMA}
    plain = {key: value for key, value in extra.items() if not isinstance(value, dict)}
    sections = {"Notes": plain} if plain else {}
    sections |= {key: value for key, value in extra.items() if isinstance(value, dict)}
    texts = []
    for key, section in sections.items():
        texts += [f"## {key.replace('_', ' ').capitalize()}", _markdown(*_section_table(section))]
    return texts


def _section_table(section: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    if not all(isinstance(values, dict) for values in section.values()):
        return ["", "value"], [[name, _number(value)] for name, value in section.items()]
    names = dict.fromkeys(name for values in section.values() for name in values)
    return ["", *section], [[name, *(_number(values.get(name)) for values in section.values())] for name in names]


def _data_sentence(results: Results) -> str:
    sizes = [f"{split} {_number(results['data'][split])}" for split in ("train", "validation", "test")]
    return f"Samples: {', '.join(sizes)}."


def _environment_sentence(results: Results) -> str:
    environment = results["environment"]
    return (
        f"Computed in {environment['precision']} on {environment['device']} ({environment['threads']} threads) "
        f"with torch {environment['torch']} in {_number(results['seconds']['total'])} seconds."
    )


def _limitations(results: Results) -> list[str]:
    split, gain = results["primary_metric"]["split"], results["gain_over_control"]
    student = results["models"]["student"]
    lines = [f"One run, seed {results['seed']}: the spread over seeds is not in these figures."]
    if results["data"][split] is not None:
        lines.append(f"The headline is measured on {results['data'][split]:,} samples of the {split} split.")
    if "test" not in student["metrics"]:
        lines.append("It was not evaluated on a test split.")
    if results["retention"] is not None and results["retention"] < 1:
        lines.append(f"It is {1 - results['retention']:.1%} behind its teacher.")
    if gain is None:
        lines.append("No student was trained without the teacher, so how much the teacher helped is unknown.")
    elif gain <= 0:
        lines.append("The same student trained without the teacher was as good or better.")
    batch, device = student["latency_ms"]["batch"], results["environment"]["device"]
    return [*lines, f"Latency was measured with batches of {batch} on {device}; other hardware differs."]


def _number(value: Any) -> str:
    """A figure as it is shown, or a dash for what is absent."""
    if value is None:
        return "–"
    if isinstance(value, list):
        return f"[{', '.join(map(_number, value))}]"
    if isinstance(value, float):
        return f"{value:,.{_decimals(value)}f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _decimals(value: float) -> int:
    """Four significant digits, or all before the point: 0.8100, 4.938, 1,234,567."""
    return 4 if abs(value) < 1 else max(0, 4 - len(str(int(abs(value)))))


def _si(value: float | None) -> str:
    if value is None:
        return "–"
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f}"


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _numeric_columns(header: list[str], rows: list[list[str]]) -> list[bool]:
    """Columns of figures stand flush right."""
    return [all(row[column][:1] in set("0123456789+-–") for row in rows) for column in range(len(header))]


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    rule = ["---:" if numeric else "---" for numeric in _numeric_columns(header, rows)]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in [header, rule, *rows]
    )


def _print_rich(header: list[str], rows: list[list[str]], title: str, below: str = "") -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # a log file has room
    table = Table(title=title)
    for name, numeric in zip(header, _numeric_columns(header, rows), strict=True):
        table.add_column(name, justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
    if below:
        console.print(below, highlight=False, markup=False)


# ---------------------------------------------------------------- several runs


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n - 1; None for a single value) of n values."""

    mean: float
    std: float | None
    n: int

    @classmethod
    def of(cls, values: list[float]) -> "Spread | None":
        if not values:
            return None
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def _student(results: Results, figure: str) -> Any:
    student = results["models"]["student"]
    return student[figure] if student else None


FIGURES: dict[str, Callable[[Results], float | None]] = {  # the columns that are averaged; sizes are the student's
    "teacher": lambda results: _primary(results, "teacher"),
    "control": lambda results: _primary(results, "control"),
    "student": lambda results: _primary(results, "student"),
    "retention": lambda results: results["retention"],
    "gain": lambda results: results["gain_over_control"],
    "parameters": lambda results: _student(results, "parameters"),
    "megabytes": lambda results: _student(results, "megabytes"),
    "latency_ms": lambda results: (_student(results, "latency_ms") or {}).get("median"),
    "seconds": lambda results: results["seconds"]["total"],
}
GROUP = ["domain", "task", "method", "metric"]


def read_runs(folders: Iterable[str | Path]) -> tuple[list[Results], list[str]]:
    """The results of finished runs, and one line for each folder that is unfinished, unreadable or a repetition."""
    runs: dict[tuple[Any, ...], Results] = {}
    problems = []
    for folder in folders:
        try:
            results = read_json(Path(folder) / "results.json")
            validate(results)
        except (UserError, ValueError) as error:
            problems.append(str(error) if isinstance(error, UserError) else f"{folder}/results.json: {error}")
            continue
        key = (*_group(results), results["seed"])
        if key in runs:  # a seed counted twice would make the spread look smaller than it is
            problems.append(f"{folder} repeats seed {results['seed']} of {', '.join(key[:3])}")
        else:
            runs[key] = results
    return list(runs.values()), problems


def comparison(run_folders: Iterable[str | Path]) -> list[dict[str, Any]]:
    """One row per (domain, task, method, primary metric) over seeds; every figure is a Spread, or None if absent."""
    return _rows(read_runs(run_folders)[0])


def _rows(runs: list[Results]) -> list[dict[str, Any]]:
    rows = []
    for group in dict.fromkeys(map(_group, runs)):
        members = [results for results in runs if _group(results) == group]
        row: dict[str, Any] = dict(zip(GROUP, group, strict=True)) | {"seeds": len(members)}
        for figure, value_of in FIGURES.items():
            values = [value for value in map(value_of, members) if value is not None]
            row[figure] = Spread.of(values)
        rows.append(row)
    return rows


def _group(results: Results) -> tuple[str, str, str, str]:
    primary = results["primary_metric"]
    return results["domain"], results["task"], results["method"], f"{primary['split']} {primary['name']}"


def _comparison_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    header = ["run", "metric", "seeds", *(figure.replace("_", " ") for figure in FIGURES)]
    cells = []
    for row in rows:
        names = [", ".join(row[key] for key in GROUP[:3]), row["metric"], str(row["seeds"])]
        cells.append([*names, *(_spread(row, figure) for figure in FIGURES)])
    return header, cells


def _spread(row: dict[str, Any], figure: str) -> str:
    spread: Spread | None = row[figure]
    if spread is None:
        return "–"
    std = "–" if spread.std is None else f"{spread.std:,.{_decimals(spread.mean)}f}"
    partial = f" (n={spread.n})" if spread.n != row["seeds"] else ""
    return f"{_number(spread.mean)} ± {std}{partial}"


def _csv(rows: list[dict[str, Any]]) -> str:
    """Unrounded, with two columns per figure: mean and standard deviation; empty where there is none."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow([*GROUP, "seeds", *(f"{figure}_{part}" for figure in FIGURES for part in ("mean", "std"))])
    for row in rows:
        spreads = [[row[key].mean, row[key].std] if row[key] else [None, None] for key in FIGURES]
        writer.writerow([row[key] for key in (*GROUP, "seeds")] + [value for pair in spreads for value in pair])
    return table.getvalue()


def main(argv: list[str] | None = None) -> None:
    """`python -m common.report RUN... [--markdown FILE] [--csv FILE]`"""
    parser = Parser(prog="python -m common.report", description="Mean and standard deviation over seeds.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, which holds results.json")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table as Markdown")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the unrounded figures as CSV")
    arguments = parser.parse_args(argv)
    runs, problems = read_runs(arguments.runs)
    if not runs:
        raise UserError(f"no finished run: {'; '.join(problems)}")
    rows = _rows(runs)
    header, cells = _comparison_table(rows)
    left_out = "\n".join(f"left out: {problem}" for problem in problems)
    _print_rich(header, cells, title="mean ± standard deviation over seeds", below=left_out)
    if arguments.markdown:
        write_text(arguments.markdown, _markdown(header, cells) + "\n")
    if arguments.csv:
        write_text(arguments.csv, _csv(rows))


if __name__ == "__main__":
    run(main)
