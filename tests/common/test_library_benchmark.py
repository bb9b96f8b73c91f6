"""benchmarks/libraries.py: its table, and the measurements of this project in its worker."""

import json
import runpy
import subprocess
import sys

import pytest

from kd_testing.paths import REPO

SCRIPT, WORKER = REPO / "benchmarks" / "libraries.py", REPO / "benchmarks" / "library_worker.py"


def test_rows_hold_rates_ratios_and_memory():
    runs = {
        "kd": [{"seconds": s, "before_mib": 100.0, "peak_mib": 150.0 + s} for s in (0.1, 0.2, 0.4)],
        "torchdistill": [{"seconds": s, "before_mib": 100.0, "peak_mib": 200.0} for s in (0.5, 0.4, 0.2)],
    }
    first, second = runpy.run_path(str(SCRIPT))["rows_of"]("images_kd", runs)
    assert first == ["images_kd", "this project", "5.00", "2.50", "10.00", "2.00", "150.2", "50.20"]
    assert second == ["images_kd", "torchdistill", "2.50", "2.00", "5.00", "1.00", "200.0", "100.0"]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["images_kd", "images_sp", "texts_kd", "language_js"])
def test_the_worker_measures_this_project(case):
    command = [sys.executable, str(WORKER), "--library", "kd", "--case", case, "--steps", "2", "--batch_size", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["seconds"] > 0 and figures["peak_mib"] >= figures["before_mib"] > 0
    assert set(figures["versions"]) == {"torch", "transformers"}


@pytest.mark.slow
def test_a_python_without_the_libraries_is_one_line():
    command = [sys.executable, str(SCRIPT), "--library_python", sys.executable, "--cases", "texts_kd"]
    command += ["--steps", "2", "--batch_size", "2", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "textbrewer failed" in done.stderr and len(done.stderr.splitlines()) == 1
