"""A run's folder: a mark that identifies it, a lock, what the run began with, and what it wrote.

A folder with other contents is never taken over. A run is continued with the arguments and inputs that it began with.
Starting over removes the files that the run wrote: those listed in a SHA256SUMS, and those whose names the mark
declares. Everything else stays, and no symbolic link is followed.
"""

import logging
import os
import shlex
from collections.abc import Collection, Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal, Protocol

import yaml

from kd.common.cli import recipe_of, save_recipe
from kd.common.reporting.results import RECIPE, RESULTS
from kd.common.utils.devices import command
from kd.common.utils.errors import UserError
from kd.common.utils.files import (
    CHECKSUMS,
    LOCK,
    FolderLock,
    lock_folder,
    read_checksums,
    read_json,
    sha256,
    write_json,
)

logger = logging.getLogger(__name__)

MARK = "run.json"
REPORT_FILES = (RESULTS, "report.md", "curves.png")
IN_CHECKPOINTS = (CHECKSUMS, ".safetensors", ".json", ".pt", ".pth", ".bin", ".npz", ".zip", ".distcp", ".metadata")
RUN_FILES = (  # patterns of paths inside a run's folder; `*` also matches slashes
    RECIPE,
    *REPORT_FILES,
    *(f"checkpoints/*/checkpoint-*/*{end}" for end in IN_CHECKPOINTS),
    "tensorboard/*/events.out.tfevents.*",
)
TEMPORARY = (".*.[0-9]*.tmp", ".*.writing.[0-9]*", ".*.old.[0-9]*")  # names of unfinished files and folders
NAMES_NO_FILE = {"report_to", "run_name", "rollout_policy"}  # flags whose values may equal the name of a run's folder
MAY_CHANGE = {"output_dir", "resume_from_checkpoint", "overwrite_output_dir"}  # when a run is continued


class RunSettings(Protocol):
    """What a run must know, whatever trains in it."""

    output_dir: str | None
    seed: int
    seeds: list[int] | None
    overwrite_output_dir: bool
    resume_from_checkpoint: bool

    @property
    def precision(self) -> Literal["auto", "fp32", "bf16"]: ...


class RunFolder:
    """A folder that one process at a time holds, for as long as this object lives.

    Args:
        path: made if it does not exist.
        files: patterns of the files that are written into it and listed in no SHA256SUMS.
        shared: a folder, relative to `path`, whose finished stages this run uses.

    Raises UserError where the path is no folder, holds something other than a run, or is held by another process, and
    where a symbolic link stands for a folder inside it or for a file that the run writes.
    """

    lock: FolderLock

    def __init__(self, path: Path, files: Iterable[str] = (), shared: str | None = None) -> None:
        self.path, self.files, self.shared = path, tuple(files), shared
        check_is_run_or_empty(path)
        marked = (path / MARK).exists()
        if marked:
            list(_written(path, self.files))  # refuses symbolic links
        path.mkdir(parents=True, exist_ok=True)
        self.lock = lock_folder(path)
        mark = read_mark(path) if marked else self._write_mark()
        self.shared = mark.get("shared")
        if mark.get("removing"):  # killed before all of an earlier run was removed
            self._remove_files()
            mark = self._write_mark()
        self.fingerprints: dict[str, str] = mark["fingerprints"]

    def _write_mark(self, **entries: Any) -> dict[str, Any]:
        mark = {
            "format": "distillation run 1",
            "files": self.files,
            "fingerprints": {},
            "shared": self.shared,
        } | entries
        write_json(self.path / MARK, mark)
        return mark

    def begin(
        self,
        args: RunSettings,
        instances: tuple[Any, ...],
        last_file: str = RESULTS,
        may_change: Collection[str] = (),
    ) -> None:
        """Starts a run with `args` and the other argument objects `instances`, continues it, or starts over.

        Raises UserError where `args` ask for none of these and there is a run, and where a run that is continued was
        started with other arguments, but for those in `may_change`. A finished run has the file `last_file`.
        """
        if starts_over(args):
            self.remove(instances)
        if not self.has_begun:
            if args.resume_from_checkpoint:
                logger.warning("nothing to continue in %s: starting from the beginning", self.path)
            self.save_arguments(*instances)
        elif not args.resume_from_checkpoint:
            state = "a finished" if (self.path / last_file).exists() else "an unfinished"
            raise UserError(
                f"{self.path} holds {state} run: continue it with --resume_from_checkpoint, start over with "
                "--overwrite_output_dir, or choose another --output_dir"
            )
        else:
            self.check_arguments(*instances, may_change=may_change)

    @property
    def has_begun(self) -> bool:
        """Whether there are arguments of a run."""
        return RECIPE in self.fingerprints or (self.path / RECIPE).exists()

    def save_arguments(self, *instances: Any) -> None:
        """Writes the recipe, and its fingerprint into the mark."""
        save_recipe(self.path / RECIPE, *instances)
        self.check_inputs(**{RECIPE: sha256(self.path / RECIPE)})

    def check_arguments(self, *instances: Any, may_change: Collection[str] = ()) -> None:
        """Raises UserError where the run began with other arguments than what `may_change`, or where its recipe is not
        what was written.
        """
        recipe = self.path / RECIPE
        if not recipe.exists() or self.fingerprints.get(RECIPE, found := sha256(recipe)) != found:
            raise UserError(
                f"{recipe} is missing, damaged or edited: restore it, or start over with --overwrite_output_dir"
            )
        check_same_arguments(self.path, instances, may_change)

    def check_inputs(self, **fingerprints: str) -> None:
        """Stores the fingerprints of what the run began with, such as data and teacher.

        Raises UserError where a run that is continued began with others.
        """
        changed = [name for name, value in fingerprints.items() if self.fingerprints.get(name, value) != value]
        if changed:
            raise UserError(
                f"cannot continue {self.path}: {' and '.join(changed).replace('_', ' ')} changed since the run began; "
                "restore what it began with, or start another run with another --output_dir"
            )
        if fingerprints.keys() - self.fingerprints.keys():
            self.fingerprints |= fingerprints
            self._write_mark(fingerprints=self.fingerprints)

    # ---- removing ----

    def remove(self, instances: Iterable[Any] = ()) -> None:
        """Removes the files that runs wrote into this folder. Everything else stays, and is named in a warning.

        Raises UserError where an argument in `instances`, such as the teacher, names one of these files or a folder
        with one, and where another process holds a run inside this folder.
        """
        files = list(_written(self.path, self.files))
        self._refuse_needed(files, instances)
        inner = [lock_folder(file.parent) for file in files if file.name == LOCK]
        self._write_mark(removing=True)
        del inner
        self._remove_files()
        self.fingerprints = self._write_mark()["fingerprints"]

    def remove_below(self, name: str) -> None:
        """Removes the files that the run wrote into one of its folders, such as `checkpoints/teacher`."""
        if (self.path / name).exists():
            _unlink(self.path, (f for f in _written(self.path, self.files) if f.is_relative_to(self.path / name)))

    def _remove_files(self) -> None:
        _unlink(self.path, (file for file in _written(self.path, self.files) if file != self.path / MARK))
        kept = [path for path in self.path.rglob("*") if path.is_file() and path.name not in (MARK, LOCK)]
        if kept:
            names = ", ".join(map(str, kept[:3])) + (", ..." if len(kept) > 3 else "")
            logger.warning("kept %d files that the run did not write: %s", len(kept), names)

    def _refuse_needed(self, files: list[Path], instances: Iterable[Any]) -> None:
        resolved, root = [file.resolve() for file in files], self.path.resolve()
        paths = {flag: value for flag, value in recipe_of(*instances).items() if flag not in NAMES_NO_FILE}
        for flag, value in paths.items():
            for word in value if isinstance(value, list) else [value]:
                asked = Path(str(word)).resolve()
                inside = asked != root and asked.is_relative_to(root)
                if inside and any(file.is_relative_to(asked) for file in resolved):
                    raise UserError(
                        f"--overwrite_output_dir would remove {word}, which is --{flag}: choose another --output_dir"
                    )


def check_is_run_or_empty(path: Path) -> None:
    """Raises UserError where a path is no folder, or a folder that holds something other than a run."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file: choose another --output_dir")
    if not (path / MARK).exists() and (found := _first_of_others(path)):
        raise UserError(
            f"{path} is not empty and holds no run ({found}): choose a new or empty folder as --output_dir"
        )


def starts_over(args: RunSettings) -> bool:
    return args.overwrite_output_dir and not args.resume_from_checkpoint


def read_mark(folder: Path) -> dict[str, Any]:
    """The mark of a run's folder. Raises UserError where it is damaged."""
    try:
        mark = read_json(folder / MARK)
    except UserError:  # unreadable, or no JSON
        mark = None
    if not isinstance(mark, dict) or not {"files", "fingerprints"} <= mark.keys():
        raise UserError(
            f"{folder / MARK}, which marks the folder of a run, is damaged: choose another --output_dir, or remove "
            f"{folder}"
        )
    return mark


def check_same_arguments(folder: Path, instances: tuple[Any, ...], may_change: Collection[str] = ()) -> None:
    """Raises UserError where the run in a folder was started with other arguments than what `may_change`."""
    before = read_recipe(folder)
    after = yaml.safe_load(yaml.safe_dump(recipe_of(*instances))) or {}
    names = sorted((before.keys() | after.keys()) - MAY_CHANGE - set(may_change))
    changed = [f"{n} (was {before.get(n)}, now {after.get(n)})" for n in names if before.get(n) != after.get(n)]
    if changed:
        raise UserError(
            f"cannot continue {folder} with other arguments: {', '.join(changed)}; a new run with them: "
            f"{shlex.join(_anew(folder))}"
        )


def read_recipe(folder: Path) -> dict[str, Any]:
    """The arguments that a run was started with. Raises UserError where they cannot be read."""
    path = folder / RECIPE
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({' '.join(str(error).split())}): the run cannot be continued") from None
    if not isinstance(recipe, dict):
        raise UserError(f"{path} is damaged: it holds no arguments, so the run cannot be continued")
    return recipe


def _anew(folder: Path) -> list[str]:
    """This program's command line, for a run in another folder."""
    words, kept = command(), list[str]()
    while words:
        word = words.pop(0)
        flag = word.partition("=")[0]
        if flag not in ("--output_dir", "--resume_from_checkpoint", "--overwrite_output_dir"):
            kept.append(word)
        elif "=" not in word and words and not words[0].startswith("--"):
            words.pop(0)
    return [*kept, "--output_dir", f"{folder}_2"]


# ---- what a run wrote ----


def _written(folder: Path, files: Iterable[str]) -> Iterator[Path]:
    """The files below a run's folder that runs wrote. Raises UserError at a symbolic link in their place."""
    listed: set[Path] = set()
    runs = {folder: tuple(files)}
    for place, folders, names in os.walk(folder):
        here = Path(place)
        for path in (here / name for name in folders):
            _refuse_link(path)
        if here != folder and MARK in names:
            runs[here] = tuple(read_mark(here)["files"])
        root = next(parent for parent in (here, *here.parents) if parent in runs)
        if CHECKSUMS in names:
            listed |= {here / CHECKSUMS, *(here / name for name in _names_in(here))}
        for path in (here / name for name in names):
            inside = path.relative_to(root)
            marks = (MARK,) if root == folder else (MARK, LOCK)  # an inner run is removed with its lock
            declared = any(fnmatch(inside.as_posix(), pattern) for pattern in (*marks, *runs[root]))
            if declared or path in listed or _is_temporary(inside):
                _refuse_link(path)
                yield path


def _names_in(folder: Path) -> Collection[str]:
    try:
        return read_checksums(folder).keys()
    except UserError:  # damaged: which files were written is not known any more
        return ()


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise UserError(
            f"{path} is a symbolic link, and a run removes nothing through one: put what it points to in its place, "
            "or choose another --output_dir"
        )


def _is_temporary(path: Path) -> bool:
    return any(fnmatch(part, pattern) for part in path.parts for pattern in TEMPORARY)


def _unlink(folder: Path, files: Iterable[Path]) -> None:
    """Removes files, lists of checksums and marks last, then the folders that became empty."""
    emptied = set()
    for file in sorted(files, key=lambda file: file.name in (CHECKSUMS, MARK)):
        file.unlink()
        emptied |= {parent for parent in file.parents if parent != folder and parent.is_relative_to(folder)}
    for parent in sorted(emptied, key=lambda path: len(path.parts), reverse=True):
        if not any(parent.iterdir()):
            parent.rmdir()


def _first_of_others(folder: Path) -> str | None:
    """The name of something in a folder, but for what a run that was killed at its very beginning leaves."""
    if not folder.exists():
        return None
    names = sorted(path.name for path in folder.iterdir())
    return next((name for name in names if name != LOCK and not fnmatch(name, f".{MARK}.*.tmp")), None)
