"""Running a script as its user does, in this process."""

import runpy
import sys

from paths import REPO


def run_script(path: str, *words: object) -> None:
    """`python PATH WORDS`; the path is that below the repository's root."""
    before, sys.argv = sys.argv, [str(REPO / path), *map(str, words)]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        sys.argv = before
