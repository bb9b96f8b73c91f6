"""`--help` is quick, and fits on two screens."""

import subprocess
import sys
from pathlib import Path

import pytest

from kd.common.training.arguments import METHOD_NAMES
from kd_testing.paths import REPO

SCRIPTS = [path.relative_to(REPO) for path in sorted(REPO.glob("*/scripts/*.py")) if path.stem != "__init__"]
MODULES = ["kd.common.reporting", "kd.common.export", "kd.common.new_domain"]
PROGRAM = """
import runpy, sys
try:
    {call}
except SystemExit as exit:
    print(exit.code, sorted({{"torch", "transformers", "stable_baselines3"}} & set(sys.modules)), file=sys.stderr)
"""


def show_help(call: str, flag: str = "--help") -> tuple[str, str]:
    """The standard output of a program, and its exit code and large imports on standard error."""
    command = [sys.executable, "-c", PROGRAM.format(call=call), flag]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=60)
    return done.stdout, done.stderr.strip()


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_help_of_a_script_imports_no_torch_and_is_short(script: Path) -> None:
    output, ending = show_help(f"sys.argv[0] = '{script}'; runpy.run_path('{script}', run_name='__main__')")
    assert ending == "0 []"
    assert len(output.splitlines()) <= 100 and max(map(len, output.splitlines())) <= 100
    assert "--help" in output


@pytest.mark.parametrize("module", MODULES)
def test_help_of_a_module_imports_no_torch_and_is_short(module: str) -> None:
    output, ending = show_help(f"runpy.run_module('{module}', run_name='__main__', alter_sys=True)")
    assert ending == "0 []"
    assert len(output.splitlines()) <= 100 and max(map(len, output.splitlines())) <= 100


@pytest.mark.slow
def test_help_all_adds_the_flags_of_training_arguments() -> None:
    script = "NLP/scripts/distill_classifier.py"
    output, ending = show_help(f"runpy.run_path('{script}', run_name='__main__')", "--help-all")
    assert ending.startswith("0 ")
    assert "--adam_beta1" in output and "--align_epochs" in output


def test_help_names_all_methods() -> None:
    """The help lists the names without importing the methods."""
    from kd.image_classification.student_model.arguments import IMAGE_METHODS  # not in the tests of a new domain
    from kd.image_classification.student_model.methods import METHODS

    assert IMAGE_METHODS == tuple(METHODS)
    assert METHOD_NAMES == IMAGE_METHODS[: len(METHOD_NAMES)]
