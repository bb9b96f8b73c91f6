"""Runs the code of an export's README.md without this project."""

import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

PROJECT = ("common", "nlp", "image_classification", "reinforcement_learning", "stable_baselines3")


def run_readme(folder: Path, *missing: str) -> dict[str, Any]:
    """Runs the code, and returns its variables. Importing the project, or a module of `missing`, is an error."""
    code = "\n".join(re.findall("```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL))
    found: dict[str, Any] = {}
    with mock.patch.dict(sys.modules, dict.fromkeys([*PROJECT, *missing])):
        exec(code, found)
    return found
