"""Runs scripts in this process, as from the command line."""

import runpy
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

from matplotlib.figure import Figure

from kd_testing.paths import REPO

INIT = Figure.__init__


def _rough(figure: Figure, figsize: Any = None, dpi: Any = None, layout: Any = None, **others: Any) -> None:
    """Draws with fewer pixels and without layout, which halves the time of a figure."""
    INIT(figure, figsize, 80, **others)


def run_script(path: str, *arguments: object) -> None:
    """Runs `python PATH ARGUMENTS` with coarse figures. PATH is relative to the repository."""
    before, sys.argv = sys.argv, [str(REPO / path), *map(str, arguments)]
    try:
        with mock.patch.object(Figure, "__init__", _rough):
            runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        sys.argv = before


@cache
def recipe_of(*arguments: str) -> Path:
    """Writes `--flag value` arguments to a recipe. A recipe may hold flags without effect, which the command line
    rejects.
    """
    path = Path(tempfile.mkdtemp()) / "recipe.yaml"
    pairs = zip(arguments[::2], arguments[1::2], strict=True)
    path.write_text("".join(f"{flag.removeprefix('--')}: {value}\n" for flag, value in pairs), encoding="utf-8")
    return path
