"""Where raw splits come from: the embedded generator, a local folder or the Hugging Face Hub."""

from pathlib import Path

from common.sources import HUB_NAME, Splits, read_folder, read_hub, usual_names
from common.utils.errors import UserError
from nlp.data.intents import load_intents
from nlp.data.tasks import TASKS

INSTEAD = "pass --dataset FOLDER with parquet, CSV or JSON files, or --dataset intents, which needs no download"


def read_splits(dataset: str) -> tuple[Splits, list[str]]:
    """Returns the splits by their usual names, columns as found, and notes on what was left out."""
    if dataset == "intents":
        return dict(load_intents()), []
    if dataset in TASKS:
        return _read_task(dataset)
    if Path(dataset).is_dir():
        return usual_names(read_folder(Path(dataset)), dataset)
    if HUB_NAME.fullmatch(dataset) and not Path(dataset).exists():
        name, _, config = dataset.partition(":")
        return usual_names(read_hub(dataset, name, config or None, INSTEAD), dataset)
    raise UserError(
        f"unknown dataset {dataset!r}: give a known name ({', '.join(TASKS)}), "
        "a folder of parquet, CSV or JSON files, or a Hub name such as owner/name or owner/name:config"
    )


def _read_task(name: str) -> tuple[Splits, list[str]]:
    task = TASKS[name]
    splits = read_hub(name, task.hub, task.config, INSTEAD)
    wanted = ["train", *task.validation, *([task.test] if task.test else [])]
    return {name: splits[name] for name in wanted}, []
