"""Virtual environments for what is installed in them, and commands that must succeed."""

import os
import subprocess
import sysconfig
import venv
from pathlib import Path


def call(folder: Path, *words: object, status: int = 0) -> str:
    """The output of a command, run in a folder, that must end with an exit status."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(list(map(str, words)), cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == status, (done.stdout + done.stderr)[-4000:]
    return done.stderr if status else done.stdout


def empty_environment(folder: Path) -> Path:
    """The Python of a new virtual environment that also finds the packages of this one, but not this project."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    packages = call(folder, python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    Path(packages, "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return python
