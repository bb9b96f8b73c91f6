"""The folder of a run: a mark that identifies it, a lock, fingerprints of the inputs, and patterns of the run's files.

A folder with other content is never used. A run is continued only with the arguments and inputs that it was started
with. Starting over removes the files that the run wrote: files listed in a SHA256SUMS, and files that match the
patterns in the mark. All other files are kept, and no symbolic link is followed.
"""

import logging
import os
import shlex
from collections.abc import Collection, Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from kd.common.cli import recipe_of, save_recipe
from kd.common.reporting.results import RECIPE, RESULTS, read_recipe
from kd.common.training.arguments import RunArguments
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
    "teacher_logits/teacher_logits.json",
    "teacher_logits/.lock",
)
TEMPORARY = (".*.[0-9]*.tmp", ".*.writing.[0-9]*", ".*.old.[0-9]*")  # names of unfinished files and folders
NOT_PATHS = {"report_to", "run_name", "rollout_policy"}  # flags whose values are not paths, even if they look like one
MAY_CHANGE = {"output_dir", "resume_from_checkpoint", "overwrite_output_dir"}  # when a run is continued


class RunFolder:
    """A folder that is locked for other processes as long as this object lives.

    Args:
        path: Created if it does not exist.
        files: Patterns of the files that the run writes and that are not listed in a SHA256SUMS.
        shared: A folder, relative to `path`, whose finished stages this run uses.

    Raises UserError if the path is not a folder, contains something other than a run, or is in use by another process,
    or if a folder inside it, or a file that the run wrote, was replaced by a symbolic link.
    """

    lock: FolderLock

    def __init__(self, path: Path, files: Iterable[str] = (), shared: str | None = None) -> None:
        self.path, self.files, self.shared = path, tuple(files), shared
        check_is_run_or_empty(path)
        has_mark = (path / MARK).exists()
        if has_mark:
            list(_written_files(path, self.files))  # raises UserError for symbolic links
        path.mkdir(parents=True, exist_ok=True)
        self.lock = lock_folder(path)
        mark = read_mark(path) if has_mark else self._write_mark()
        self.shared = mark.get("shared")
        if mark.get("removing"):  # a process was killed while it removed an earlier run
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
        args: RunArguments,
        instances: tuple[Any, ...],
        last_file: str = RESULTS,
        may_change: Collection[str] = (),
    ) -> None:
        """Starts a run, continues it, or starts over, depending on `args`.

        Args:
            instances: All argument objects, which are stored as the run's recipe.
            last_file: The file that a finished run contains.
            may_change: Arguments that may change when the run is continued.

        Raises UserError if the folder contains a run that `args` neither continue nor overwrite, or if a run that is
        continued was started with other arguments.
        """
        if starts_over(args):
            self.remove(instances)
        if RECIPE not in self.fingerprints and not (self.path / RECIPE).exists():
            if args.resume_from_checkpoint:
                logger.warning("nothing to continue in %s: starting from the beginning", self.path)
            save_recipe(self.path / RECIPE, *instances)
            self.check_inputs(**{RECIPE: sha256(self.path / RECIPE)})
        elif args.resume_from_checkpoint:
            self._check_arguments(instances, may_change)
        else:
            state = "a finished" if (self.path / last_file).exists() else "an unfinished"
            raise UserError(
                f"{self.path} contains {state} run: continue it with --resume_from_checkpoint, start over with "
                "--overwrite_output_dir, or choose another --output_dir"
            )

    def _check_arguments(self, instances: tuple[Any, ...], may_change: Collection[str]) -> None:
        recipe = self.path / RECIPE
        if not recipe.exists() or self.fingerprints.get(RECIPE, found := sha256(recipe)) != found:
            raise UserError(
                f"{recipe} is missing, damaged or edited: restore it, or start over with --overwrite_output_dir"
            )
        before = read_recipe(self.path)
        after = yaml.safe_load(yaml.safe_dump(recipe_of(*instances))) or {}
        names = sorted((before.keys() | after.keys()) - MAY_CHANGE - set(may_change))
        changed = [f"{n} (was {before.get(n)}, now {after.get(n)})" for n in names if before.get(n) != after.get(n)]
        if changed:
            raise UserError(
                f"cannot continue {self.path} with other arguments: {', '.join(changed)}; a new run with them: "
                f"{shlex.join(_new_command(self.path))}"
            )

    def check_inputs(self, **fingerprints: str) -> None:
        """Stores the fingerprints of the run's inputs, such as data and teacher.

        Raises UserError if the run is continued and was started with other inputs.
        """
        changed = [name for name, value in fingerprints.items() if self.fingerprints.get(name, value) != value]
        if changed:
            raise UserError(
                f"cannot continue {self.path}: {' and '.join(changed).replace('_', ' ')} changed since the run began; "
                "restore the original, or start a new run with another --output_dir"
            )
        if fingerprints.keys() - self.fingerprints.keys():
            self.fingerprints |= fingerprints
            self._write_mark(fingerprints=self.fingerprints)

    # ---- removing ----

    def remove(self, instances: Iterable[Any] = ()) -> None:
        """Removes the files that runs wrote into this folder. Other files are kept and named in a warning.

        Raises UserError if an argument in `instances`, such as the teacher, is one of these files or a folder that
        contains one, and if another process uses a run inside this folder.
        """
        files = list(_written_files(self.path, self.files))
        self._check_unused(files, instances)
        inner_locks = [lock_folder(file.parent) for file in files if file.name == LOCK]
        self._write_mark(removing=True)
        del inner_locks
        self._remove_files()
        self.fingerprints = self._write_mark()["fingerprints"]

    def remove_below(self, name: str) -> None:
        """Removes the files that the run wrote into one of its folders, such as `checkpoints/teacher`."""
        below = self.path / name
        if below.exists():
            _unlink(self.path, (f for f in _written_files(self.path, self.files) if f.is_relative_to(below)))

    def _remove_files(self) -> None:
        _unlink(self.path, (file for file in _written_files(self.path, self.files) if file != self.path / MARK))
        kept = [path for path in self.path.rglob("*") if path.is_file() and path.name not in (MARK, LOCK)]
        if kept:
            names = ", ".join(map(str, kept[:3])) + (", ..." if len(kept) > 3 else "")
            logger.warning("kept %d files that the run did not write: %s", len(kept), names)

    def _check_unused(self, files: list[Path], instances: Iterable[Any]) -> None:
        resolved, root = [file.resolve() for file in files], self.path.resolve()
        values = {flag: value for flag, value in recipe_of(*instances).items() if flag not in NOT_PATHS}
        for flag, value in values.items():
            for word in value if isinstance(value, list) else [value]:
                path = Path(str(word)).resolve()
                inside = path != root and path.is_relative_to(root)
                if inside and any(file.is_relative_to(path) for file in resolved):
                    raise UserError(
                        f"--overwrite_output_dir would remove {word}, which is --{flag}: choose another --output_dir"
                    )


def check_is_run_or_empty(path: Path) -> None:
    """Raises UserError if a path is not a folder, or is a folder that contains something other than a run."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file: choose another --output_dir")
    if not path.exists() or (path / MARK).exists():
        return
    for name in sorted(file.name for file in path.iterdir()):
        if name != LOCK and not fnmatch(name, f".{MARK}.*.tmp"):  # a run that was killed at once leaves these
            raise UserError(
                f"{path} is not empty and contains no run ({name}): choose a new or empty folder as --output_dir"
            )


def starts_over(args: RunArguments) -> bool:
    return args.overwrite_output_dir and not args.resume_from_checkpoint


def read_mark(folder: Path) -> dict[str, Any]:
    """The mark of a run's folder. Raises UserError if it is damaged."""
    try:
        mark = read_json(folder / MARK)
    except UserError:  # unreadable, or not JSON
        mark = None
    if not isinstance(mark, dict) or not {"files", "fingerprints"} <= mark.keys():
        raise UserError(
            f"{folder / MARK}, which marks the folder of a run, is damaged: choose another --output_dir, or remove "
            f"{folder}"
        )
    return mark


def _new_command(folder: Path) -> list[str]:
    """This program's command line with another output folder."""
    words, kept, dropped = command(), list[str](), {f"--{name}" for name in MAY_CHANGE}
    while words:
        word = words.pop(0)
        if word.partition("=")[0] not in dropped:
            kept.append(word)
        elif "=" not in word and words and not words[0].startswith("--"):
            words.pop(0)
    return [*kept, "--output_dir", f"{folder}_2"]


# ---- which files a run wrote ----


def _written_files(folder: Path, files: Iterable[str]) -> Iterator[Path]:
    """Yields the files that runs wrote into a folder. Raises UserError if one was replaced by a symbolic link."""
    listed: set[Path] = set()
    runs = {folder: tuple(files)}
    for place, folders, names in os.walk(folder):
        here = Path(place)
        for path in (here / name for name in folders):
            _check_not_link(path)
        if here != folder and MARK in names:
            runs[here] = tuple(read_mark(here)["files"])
        root = next(parent for parent in (here, *here.parents) if parent in runs)
        if CHECKSUMS in names:
            listed |= {here / CHECKSUMS, *(here / name for name in _listed_names(here))}
        for path in (here / name for name in names):
            relative = path.relative_to(root)
            marks = (MARK,) if root == folder else (MARK, LOCK)  # an inner run is removed with its lock
            matches = any(fnmatch(relative.as_posix(), pattern) for pattern in (*marks, *runs[root]))
            temporary = any(fnmatch(part, pattern) for part in relative.parts for pattern in TEMPORARY)
            if matches or temporary or path in listed:
                _check_not_link(path)
                yield path


def _listed_names(folder: Path) -> Collection[str]:
    try:
        return read_checksums(folder).keys()
    except UserError:  # damaged, so it is unknown which files were written
        return ()


def _check_not_link(path: Path) -> None:
    if path.is_symlink():
        raise UserError(
            f"{path} is a symbolic link, which a run does not follow when it removes files: replace the link with its "
            "target, or choose another --output_dir"
        )


def _unlink(folder: Path, files: Iterable[Path]) -> None:
    """Removes files, checksums and marks last, and then the folders that became empty."""
    emptied = set()
    for file in sorted(files, key=lambda file: file.name in (CHECKSUMS, MARK)):
        file.unlink()
        emptied |= {parent for parent in file.parents if parent != folder and parent.is_relative_to(folder)}
    for parent in sorted(emptied, key=lambda path: len(path.parts), reverse=True):
        if not any(parent.iterdir()):
            parent.rmdir()
