"""Lays out a new domain at the root of the repository: a copy of the template under its name.

    python -m kd.common.new_domain speech

The folder bird-songs is imported as `kd.bird_songs`. The domain's test goes to tests/bird-songs, its link for editors
and type checkers to typings/kd/bird_songs.
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

NEXT = """{folder}/ is laid out, its test in tests/{folder}/. Next, from {root}:

    pip install -r requirements.txt
    python {folder}/scripts/distill.py
    python {folder}/scripts/evaluate.py runs/{folder}/distill/student
    pytest -q tests/{folder} tests/test_layout.py

{folder}/README.md says where your data and models go."""


def main() -> None:
    parser = Parser(prog="python -m kd.common.new_domain", description=__doc__)
    parser.add_argument("folder", help="letters, digits, - and _, such as bird-songs")
    folder = parser.parse_args().folder
    if not TEMPLATE.is_dir():
        raise UserError("a domain is made from templates/domain: run this in a checkout of the repository")
    name = checked_import_name(folder)
    refuse_taken(folder, name)
    try:
        lay_out(folder, name)
    except OSError as error:
        raise UserError(f"cannot write {error.filename}: {error.strerror}") from error
    print(NEXT.format(folder=folder, root=ROOT))


def checked_import_name(folder: str) -> str:
    """What a domain's folder is imported as. Raises UserError where that cannot be imported."""
    name = import_name(folder)
    if not re.fullmatch(r"[a-z]\w*", name, re.ASCII) or keyword.iskeyword(name):
        raise UserError(f"{folder!r} gives no import name: take letters, digits, - and _, such as bird-songs")
    return name


def refuse_taken(folder: str, name: str) -> None:
    """Raises UserError where something else has that name."""
    for place in (ROOT, ROOT / "typings" / "kd", ROOT / "tests"):
        for path in place.iterdir():
            if import_name(path.stem) == name:
                raise UserError(f"the name {folder} is taken, by {path.relative_to(ROOT)}: choose another")


def lay_out(folder: str, name: str) -> None:
    """Domain, test and link; where something fails, none of them."""

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
            shutil.copymode(source, target)  # a .sh can be run
        _tidy(domain, tests)
        (ROOT / "typings" / "kd" / name).symlink_to(f"../../{folder}", target_is_directory=True)


def _tidy(*folders: Path) -> None:
    """Under another name imports come in another order, and lines have other lengths."""
    for words in (["check", "--select", "I", "--fix"], ["format"]):
        command = [sys.executable, "-m", "ruff", *words, "--no-cache", "--quiet", *map(str, folders)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            reason = done.stdout + done.stderr
            raise UserError(f"ruff cannot sort the imports ({reason}): pip install -r requirements.txt installs it")


if __name__ == "__main__":
    run(main)
