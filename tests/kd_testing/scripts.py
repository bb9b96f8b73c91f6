"""Runs scripts in this process, as from the command line."""

import runpy
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

from matplotlib.figure import Figure
from PIL import Image

from kd_testing.paths import REPO

INIT = Figure.__init__
DRAWN: set[str] = set()  # scripts whose figures this process has drawn


def _rough(figure: Figure, figsize: Any = None, dpi: Any = None, layout: Any = None, **others: Any) -> None:
    """Draws with fewer pixels and without layout, which halves the time of a figure."""
    INIT(figure, figsize, 80, **others)


def _blank(figure: Figure, file: Any, **_: Any) -> None:
    """Writes a white image of the figure's size."""
    Image.new("L", figure.canvas.get_width_height(), 255).save(file, "png")


def run_script(path: str, *arguments: object, draw: bool = False) -> None:
    """Runs `python PATH ARGUMENTS`, or `python -m PACKAGE` for its __main__.py, with coarse figures. PATH is relative
    to the repository. To save time, only the first run of each script in this process, and runs with `draw`, draw
    their figures.
    """
    before, sys.argv = sys.argv, [str(REPO / path), *map(str, arguments)]
    folders = sys.path if path.endswith("__main__.py") else [str((REPO / path).parent), *sys.path]
    save = Figure.savefig if draw or path not in DRAWN else _blank
    DRAWN.add(path)
    try:
        figures = mock.patch.multiple(Figure, __init__=_rough, savefig=save)
        with figures, mock.patch.object(sys, "path", folders):
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
