"""Creates a new domain at the root of the repository: a copy of the template under a new name.

    python -m kd.common.new_domain speech

A folder bird-songs is imported as `kd.bird_songs`. The test of the domain is created in tests/bird-songs, and its link
for editors and type checkers in typings/kd/bird_songs.
"""

import keyword
import re
import shutil
import subprocess
import sys
from pathlib import Path

from kd.common.cli import Parser, run
from kd.common.utils import import_name
from kd.common.utils.errors import UserError
from kd.common.utils.files import writing_folder

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = ROOT / "templates" / "domain"
PLACEHOLDER = re.compile("example([-_])domain")  # the folder, the import name

NEXT = """created {folder}/ and tests/{folder}/. Next, from {root}:

    pip install -r requirements.txt
    python {folder}/scripts/distill.py
    python {folder}/scripts/evaluate.py runs/{folder}/distill/student
    pytest -q tests/{folder} tests/test_layout.py

{folder}/README.md explains where to put your data and models."""


def main() -> None:
    parser = Parser(prog="python -m kd.common.new_domain", description=__doc__)
    parser.add_argument("folder", help="Name of the domain: letters, digits, - and _, such as bird-songs.")
    folder = parser.parse_args().folder
    if not TEMPLATE.is_dir():
        raise UserError("templates/domain is missing: run this in a checkout of the repository")
    name = validate_import_name(folder)
    check_name_is_free(folder, name)
    try:
        create_domain(folder, name)
    except OSError as error:
        raise UserError(f"cannot write {error.filename}: {error.strerror}") from error
    print(NEXT.format(folder=folder, root=ROOT))


def validate_import_name(folder: str) -> str:
    """The import name of a domain's folder. Raises UserError if it is not a valid one."""
    name = import_name(folder)
    if not re.fullmatch(r"[a-z]\w*", name, re.ASCII) or keyword.iskeyword(name):
        raise UserError(f"{folder!r} is not a valid name: use letters, digits, - and _, as in bird-songs")
    return name


def check_name_is_free(folder: str, name: str) -> None:
    """Raises UserError if another file or folder uses that name."""
    for place in (ROOT, ROOT / "typings" / "kd", ROOT / "tests"):
        for path in place.iterdir():
            if import_name(path.stem) == name:
                raise UserError(f"the name {folder} is taken, by {path.relative_to(ROOT)}: choose another")


def create_domain(folder: str, name: str) -> None:
    """Creates the domain, its test and its link. If one step fails, none of them is created."""

    def renamed(text: str) -> str:
        return PLACEHOLDER.sub(lambda found: folder if found[1] == "-" else name, text)

    with (
        writing_folder(ROOT / folder, checksums=False) as domain,
        writing_folder(ROOT / "tests" / folder, checksums=False) as tests,
    ):
        for source in TEMPLATE.rglob("*"):
            place = source.relative_to(TEMPLATE)
            if source.is_dir() or any(part.startswith((".", "__pycache__")) for part in place.parts):
                continue
            target = tests / renamed(place.name) if place.parts[0] == "tests" else domain / place
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(renamed(source.read_text(encoding="utf-8")), encoding="utf-8")
            shutil.copymode(source, target)  # keeps .sh files executable
        _format(domain, tests)
        (ROOT / "typings" / "kd" / name).symlink_to(f"../../{folder}", target_is_directory=True)


def _format(*folders: Path) -> None:
    """Sorts imports and wraps lines again: both depend on the name of the domain."""
    for arguments in (["check", "--select", "I", "--fix"], ["format"]):
        command = [sys.executable, "-m", "ruff", *arguments, "--no-cache", "--quiet", *map(str, folders)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            reason = done.stdout + done.stderr
            raise UserError(f"ruff cannot sort the imports ({reason}): pip install -r requirements.txt installs it")


if __name__ == "__main__":
    run(main)
