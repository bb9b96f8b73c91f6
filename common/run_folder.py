"""What may happen to a folder that holds a run already: it is continued as it was begun, or emptied to start over."""

import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, Literal, Protocol

import yaml

from common.cli import recipe_of
from common.results import RECIPE
from common.utils.errors import UserError

MAY_CHANGE = {"resume_from_checkpoint", "overwrite_output_dir"}  # between the start of a run and its continuation


class RunSettings(Protocol):
    """What a run must know, whatever trains in it."""

    output_dir: str | None
    seed: int
    overwrite_output_dir: bool
    resume_from_checkpoint: bool

    @property
    def precision(self) -> Literal["auto", "fp32", "bf16"]: ...


def starts_over(args: RunSettings) -> bool:
    return args.overwrite_output_dir and not args.resume_from_checkpoint


def remove(folder: Path, names: Iterable[str], instances: Iterable[Any]) -> None:
    """Removes what is there of the named files and folders. Raises UserError where an argument of the run, such as its
    teacher, is one of them or lies in one.
    """
    paths = [folder / name for name in names]
    for flag, value in recipe_of(*instances).items():
        for word in value if isinstance(value, list) else [value]:
            asked = Path(str(word)).resolve()
            if any(asked.is_relative_to(path.resolve()) for path in paths):
                raise UserError(
                    f"--overwrite_output_dir would remove {word}, which is --{flag}: choose another folder"
                )
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def refuse_other_arguments(folder: Path, instances: tuple[Any, ...], may_change: Collection[str] = ()) -> None:
    """Raises UserError where the run in a folder was started with other arguments than what `may_change`."""
    before = yaml.safe_load((folder / RECIPE).read_text()) or {}
    after = yaml.safe_load(yaml.safe_dump(recipe_of(*instances))) or {}
    names = sorted((before.keys() | after.keys()) - MAY_CHANGE - set(may_change))
    changed = [f"{n} (was {before.get(n)}, now {after.get(n)})" for n in names if before.get(n) != after.get(n)]
    if changed:
        raise UserError(f"cannot continue {folder} with other arguments: {', '.join(changed)}")
