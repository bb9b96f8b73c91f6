"""`python -m kd.common.new_domain` in a copy of the repository: the new domain is installed, tested and run."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from kd.common.reporting.results import validate
from kd_testing.installation import call, empty_environment
from kd_testing.paths import REPO
from kd_testing.scripts import run_script

NEEDED = ("common", "typings", "templates", "tests/kd_testing", "tests/conftest.py",
          "tests/test_layout.py", "tests/test_documents.py", "tests/test_help.py", "setup.py", "pyproject.toml",
          "requirements.txt", "README.md", "CONTRIBUTING.md")  # fmt: skip
LAYOUT = ("a_domain_is_importable_and_complete", "domains_import_common_and_never_each_other",
          "shell_scripts_can_be_run_and_their_recipes_exist")  # fmt: skip


def copy_into(root: Path) -> Path:
    """Copies the repository without its domains."""
    for name in NEEDED:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if (REPO / name).is_dir():
            shutil.copytree(REPO / name, root / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(REPO / name, root / name)
    return root


def new_domain(root: Path, name: str) -> None:
    run_script(str(root / "common" / "new_domain.py"), name)


def installed(root: Path, environment: Path) -> Path:
    """Installs the repository at `root`, editable, in a new virtual environment. Returns its Python."""
    python = empty_environment(environment)
    flags = ["--quiet", "--no-deps", "--no-build-isolation", "--ignore-installed", "--no-index"]
    call(root, python, "-m", "pip", "install", *flags, "--editable", root)
    return python


@pytest.fixture(scope="module")
def birds(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A repository with the domain bird-songs, and a Python in which it is installed."""
    folder = tmp_path_factory.mktemp("birds")
    root = copy_into(folder / "repository")
    output = call(root, sys.executable, "common/new_domain.py", "bird-songs")
    assert "python bird-songs/scripts/distill.py" in output
    return root, installed(root, folder / "environment")


@pytest.mark.slow
def test_a_new_domain_passes_its_tests_and_those_of_the_layout(birds):
    root, python = birds
    layout = [f"tests/test_layout.py::test_{name}" for name in LAYOUT]
    layout += [f"tests/test_help.py::test_help_of_a_script_imports_no_torch_and_is_short[bird-songs/scripts/{name}.py]"
               for name in ("distill", "evaluate")]  # fmt: skip
    output = call(root, python, "-m", "pytest", "-q", "-n", "0", "-rA", "tests/bird-songs", *layout)
    for name in (*LAYOUT, "evaluate_reproduces_the_reported_metrics"):
        assert f"test_{name}" in output
    assert "skipped" not in output


@pytest.mark.slow
def test_the_commands_of_a_new_domain_run(birds):
    root, python = birds
    call(root, python, "bird-songs/scripts/distill.py")
    results = json.loads((root / "runs" / "bird-songs" / "distill" / "results.json").read_text())
    validate(results)
    assert results["models"]["teacher"]["metrics"]["test"]["accuracy"] > 0.7
    assert results["models"]["student"]["metrics"]["test"]["accuracy"] > 0.6
    call(root, python, "-m", "kd.common.export", "runs/bird-songs/distill")
    assert (root / "runs" / "bird-songs" / "distill" / "export" / "model.onnx").exists()
    call(root, "env", f"PYTHON={python}", "bird-songs/scripts/distill_soft.sh", "--max_steps", 2, "--no_control")
    assert (root / "runs" / "bird-songs" / "soft" / "report.md").exists()
    call(root, python, "-m", "pytest", "-q", "-n", "0", "tests/test_documents.py", "-k", "scripts_start or bird-songs")


@pytest.mark.parametrize(("folder", "name"), [("Audio", "audio"), ("environmental-sounds", "environmental_sounds")])
def test_all_names_are_replaced_and_ruff_accepts_the_code(tmp_path, folder, name):
    """Covers a name that sorts before `common`, and a name that makes lines longer."""
    root = copy_into(tmp_path / "repository")
    new_domain(root, folder)
    files = [path for place in (root / folder, root / "tests" / folder) for path in place.rglob("*") if path.is_file()]
    template = [path for path in (root / "templates" / "domain").rglob("*") if path.is_file()]
    assert len(files) == len(template)
    for path in files:
        assert "example" not in path.name and "example-domain" not in path.read_text(), path
        assert "example_domain" not in path.read_text(), path
    assert os.readlink(link := root / "typings" / "kd" / name) == f"../../{folder}" and (link / "README.md").exists()
    for arguments in (["check"], ["format", "--check"]):
        call(root, sys.executable, "-m", "ruff", *arguments, folder, f"tests/{folder}")


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_into(tmp_path_factory.mktemp("untouched") / "repository")


def error_of(root: Path, name: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The error message of one line for a name; nothing is written."""
    before = sorted(root.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        new_domain(root, name)
    assert ended.value.code == 2
    assert sorted(root.rglob("*")) == before
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bird songs", "not a valid name"), ("3d", "not a valid name"), ("class", "not a valid name"),
        ("../speech", "not a valid name"), ("vögel", "not a valid name"), ("", "an argument is empty"),
        ("common", "taken, by common"), ("Tests", "taken, by tests"), ("kd-testing", "taken, by tests/kd_testing"),
        ("setup", "taken, by setup.py"), ("example-domain", "taken, by typings/kd/example_domain"),
    ],
)  # fmt: skip
def test_bad_names_are_errors_of_one_line(untouched, capsys, name, message):
    assert message in error_of(untouched, name, capsys)


def test_an_existing_domain_is_never_overwritten(tmp_path, capsys):
    root = copy_into(tmp_path / "repository")
    new_domain(root, "bird-songs")
    (root / "bird-songs" / "README.md").write_text("mine")
    capsys.readouterr()
    assert "taken, by bird-songs" in error_of(root, "Bird_Songs", capsys)
    assert (root / "bird-songs" / "README.md").read_text() == "mine"


def test_a_failed_creation_leaves_no_files(tmp_path, capsys):
    root = copy_into(tmp_path / "repository")
    (root / "templates" / "domain" / "scripts" / "broken.py").write_text("def")
    assert "ruff" in error_of(root, "speech", capsys)
