"""Runs the code of a README.md, that of a model card or of an export, without this project."""

import contextlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from kd.common.utils import startup

# What torchvision needs if it was built for another torch; then transformers and timm cannot be imported without it.
OPERATORS = "import torch\nlibrary = torch.library.Library('torchvision', 'FRAGMENT')\n" + "".join(
    f"library.define({schema!r})\n" for schema in startup.SCHEMAS.values()
)


def code_of(folder: Path) -> str:
    return "\n".join(re.findall("```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL))


def run_readme(folder: Path, *missing: str) -> dict[str, Any]:
    """Runs the code next to the folder, and returns its variables. Importing the project, or a module of `missing`, is
    an error.
    """
    found: dict[str, Any] = {}
    code = code_of(folder)
    project = ["kd", *(name for name in sys.modules if name.startswith("kd."))]
    with contextlib.chdir(folder.parent), mock.patch.dict(sys.modules, dict.fromkeys([*project, *missing])):
        exec(code, found)
    return found


def run_readme_alone(folder: Path, after: str = "") -> str:
    """The output of the code, with more code after it, in a new process that cannot import the project."""
    hide = "import sys\nsys.modules['kd'] = None"
    code = "\n".join([hide, OPERATORS if startup._libraries else "", code_of(folder), after])
    done = subprocess.run([sys.executable, "-c", code], cwd=folder.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()
