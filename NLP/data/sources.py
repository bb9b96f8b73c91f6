"""Where raw splits come from: the embedded generator, a local folder or the Hugging Face Hub."""

from kd.common.data.sources import Splits, read_hub, read_named
from kd.common.utils.errors import UserError
from kd.nlp.data.intents import load_intents
from kd.nlp.data.tasks import TASKS

INSTEAD = "pass --dataset FOLDER with parquet, CSV or JSON files, or --dataset intents, which needs no download"


def read_splits(dataset: str, needs_train: bool = True) -> tuple[Splits, list[str]]:
    """Returns the splits by their usual names, columns as found, and notes on what was left out. Raises UserError for
    a missing train split unless `needs_train` is false.
    """
    if dataset == "intents":
        return dict(load_intents()), []
    if dataset in TASKS:
        return _read_task(dataset)
    others = f"a known name ({', '.join(TASKS)}), a folder or file of parquet, CSV or JSON"
    return read_named(dataset, others, INSTEAD, needs_train=needs_train)


def _read_task(name: str) -> tuple[Splits, list[str]]:
    task = TASKS[name]
    splits = read_hub(name, task.hub, task.config, INSTEAD)
    wanted = ["train", *task.validation, *([task.test] if task.test else [])]
    if missing := [name for name in wanted if name not in splits]:
        raise UserError(f"{task.hub} lacks the split {missing[0]} that {name} needs: {INSTEAD}")
    return {name: splits[name] for name in wanted}, []
