"""Virtual environments, and commands with an expected exit status."""

import os
import subprocess
import sysconfig
import venv
from pathlib import Path


def call(folder: Path, *arguments: object, status: int = 0) -> str:
    """Runs a command in a folder. Returns its stdout, or its stderr if `status` is not 0."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(list(map(str, arguments)), cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == status, (done.stdout + done.stderr)[-4000:]
    return done.stderr if status else done.stdout


def empty_environment(folder: Path) -> Path:
    """Creates a virtual environment with the packages of this one, but without this project. Returns its Python."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    packages = call(folder, python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    Path(packages, "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return python
