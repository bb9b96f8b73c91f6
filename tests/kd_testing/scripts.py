"""Running a script as its user does, in this process."""

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
    """Of few pixels, without the arrangement of its parts, which together take half of the time of a figure."""
    INIT(figure, figsize, 80, **others)


def run_script(path: str, *words: object) -> None:
    """`python PATH WORDS`, whose figures are rough; the path is that below the repository's root."""
    before, sys.argv = sys.argv, [str(REPO / path), *map(str, words)]
    try:
        with mock.patch.object(Figure, "__init__", _rough):
            runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        sys.argv = before


@cache
def recipe_of(*words: str) -> Path:
    """A recipe of `--flag value` pairs: flags that a script would refuse on the command line, as without effect for
    some of the runs of a test module, may stand in a recipe.
    """
    path = Path(tempfile.mkdtemp()) / "recipe.yaml"
    pairs = zip(words[::2], words[1::2], strict=True)
    path.write_text("".join(f"{flag.removeprefix('--')}: {value}\n" for flag, value in pairs), encoding="utf-8")
    return path
