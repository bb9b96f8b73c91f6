"""Evaluates the student of a finished run once more."""

import json
from pathlib import Path

import pytest

from kd_testing.scripts import run_script

EVALUATE = "NLP/scripts/evaluate.py"


def check_evaluation(run: Path, folder: Path, *words: object, script: str = EVALUATE) -> None:
    """Checks that `evaluate.py RUN WORDS` finds the metrics in the report of the run. Writes to `folder`."""
    run_script(script, run, "--json", folder / "again.json", *words)
    found = json.loads((folder / "again.json").read_text())["metrics"]
    reported = json.loads((run / "results.json").read_text())["models"]["student"]["metrics"]
    assert found.keys() == reported.keys()
    for split, metrics in found.items():
        assert metrics == pytest.approx({k: v for k, v in reported[split].items() if k != "agreement"}, rel=1e-5)
