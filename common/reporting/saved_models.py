"""The scripts evaluate.py of all domains: the model of a run, the data of its recipe, metrics and predictions."""

import json
import shlex
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import softmax

from kd.common.cli import Parser
from kd.common.data.sources import shorten
from kd.common.reporting.results import RECIPE, RESULTS, read_recipe
from kd.common.reporting.tables import number, print_rich, words
from kd.common.utils.errors import UserError
from kd.common.utils.files import check_writable, read_json, write_json, write_text

DEPTH = 4  # folders between a model and its run, as in RUN/seed0/students/NAME/student
Columns = Mapping[str, Sequence[Any]]  # of equal lengths


# ---------------------------------------------------------------- arguments


def parse_with_recipe(parser: Parser, data: Sequence[str], positional: str = "model") -> Namespace:
    """The arguments of the command line. Without --dataset, the arguments `data`, which describe the data, are those
    of the run that contains the model, and are printed.

    Raises UserError if no run contains the model, and as `check_files`.
    """
    argv = sys.argv[1:]
    args, explicit = parser.parse_args(argv), parser.flags_in(argv)
    check_files(args)
    if "dataset" in explicit:
        return args
    model = getattr(args, positional)
    if not _exists(model):
        raise UserError(f"there is no folder {shorten(model)}; a model of the Hub needs --dataset")
    folder = run_of(Path(model))
    recipe = {} if folder is None else read_recipe(folder)
    if folder is None or "dataset" not in recipe:
        raise UserError(f"{model} is in no run whose recipe names its data: pass --dataset FILE, FOLDER or NAME")
    flags: list[str] = []
    for name in data:
        if name in recipe and name not in explicit:
            values = recipe[name] if isinstance(recipe[name], list) else [recipe[name]]
            flags += [f"--{name}", *map(str, values)]
    print(f"note: {shlex.join(flags)}, from {folder / RECIPE}")
    return parser.parse_args([*argv, *flags])


def check_files(args: Namespace) -> None:
    """Raises UserError for a value of --predictions or --json that cannot be written."""
    files = {name: path for name in ("predictions", "json") if (path := getattr(args, name, None))}
    if "predictions" in files and Path(files["predictions"]).suffix not in (".csv", ".jsonl"):
        raise UserError(f"--predictions {files['predictions']} is no .csv or .jsonl file: change its name")
    for name, path in files.items():
        check_writable(path, f"--{name}")


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError as error:
        raise UserError(f"cannot read folder {shorten(path)}: {error.strerror}") from None


def run_of(model: Path) -> Path | None:
    """The folder of the run that contains a model."""
    places = [model, *model.parents] if model.is_absolute() else [model, *model.absolute().parents]
    return next((place for place in places[: DEPTH + 1] if (place / RECIPE).is_file()), None)


def saved_model(name: str) -> str:
    """The folder of the student of the run `name` or, if it has none, of its teacher; `name` for any other model.

    Of several seeds it is the student of the first one, which is printed.
    """
    run = Path(name)
    if (run / "config.json").exists():
        return name
    for folder in (run / "student", run / "stages" / "teacher"):
        if (folder / "config.json").exists():
            print_seeds(run)
            return str(folder)
    return name


def print_seeds(run: Path) -> None:
    """Prints which student of a run of several seeds is evaluated."""
    results = read_json(run / RESULTS) if (run / RESULTS).exists() else {}
    if isinstance(results, dict) and (seeds := results.get("seeds")):
        others = f"; the others are in {', '.join(f'{run}/seed{seed}' for seed in seeds[1:])}" if seeds[1:] else ""
        print(f"note: the student of seed {seeds[0]} is evaluated{others}")


# ---------------------------------------------------------------- results


def show_metrics(name: str, entry: dict[str, Any], path: str | None) -> None:
    """Prints the metrics of a model's entry in results.json. Writes the entry to `path` unless it is None."""
    rows = [
        [split, words(metric), f"{value:.6f}" if isinstance(value, float) else number(value)]
        for split, values in entry["metrics"].items()
        for metric, value in values.items()
    ]
    print_rich(["split", "metric", "value"], rows, title=name)
    if path:
        write_json(path, entry)


def class_predictions(logits: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> dict[str, list[Any]]:
    """The columns `label`, `prediction` and `probability`, that of the prediction, of logits (samples, classes) and
    class ids (samples,).
    """
    predicted = logits.argmax(1)
    probabilities = softmax(logits.astype(np.float64), axis=1)[np.arange(len(logits)), predicted]
    return {
        "label": [names[label] for label in labels],
        "prediction": [names[label] for label in predicted],
        "probability": probabilities.tolist(),
    }


def write_predictions(path: str | None, splits: Mapping[str, Columns]) -> None:
    """Writes a row per sample, with its split, to a .csv or .jsonl file, and prints its name. `path` may be None.

    `splits`: The other columns by split.
    """
    if path is None:
        return
    table = pd.concat([pd.DataFrame({"split": split, **columns}) for split, columns in splits.items()])
    if Path(path).suffix == ".csv":
        text = table.to_csv(index=False)
    else:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_dict("records"))
    write_text(path, text)
    print(f"predictions: {path}")
