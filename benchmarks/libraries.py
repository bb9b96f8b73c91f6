"""Compares training steps of this project with torchdistill (images), TextBrewer (texts) and TRL (language models).

    python3.11 -m venv library-venv && library-venv/bin/pip install -r benchmarks/library_requirements.txt
    python benchmarks/libraries.py --library_python library-venv/bin/python --json figures.json

Images: ResNet56 -> ResNet20, by soft targets (KD) and by similarities of the last maps (SP). Texts: a BERT of MiniLM's
size with 6 layers -> 3 layers, by soft targets. Language models: a GPT-2 of 4 layers and width 256 -> 2 layers and
width 128, 32,000 tokens of vocabulary, rows of 128 tokens, by the generalized Jensen-Shannon divergence (GKD) on given
texts; its logits are large, so pass a small batch: --cases language_js --batch_size 4. All compute the teacher's
outputs in every step. The data are random, the losses, networks, batch size and precision (fp32) are the same, and
each library augments, loads and trains in its documented way. library_worker.py runs each measurement in a process
of its own with one thread. The libraries take turns.
"""

import json
import os
import statistics
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from kd.common.cli import Parser, run
from kd.common.reporting.tables import number, print_rich
from kd.common.utils.errors import UserError
from kd.common.utils.ranges import Range

WORKER, ROOT = Path(__file__).with_name("library_worker.py"), Path(__file__).resolve().parent.parent
PEERS = {"images_kd": "torchdistill", "images_sp": "torchdistill", "texts_kd": "textbrewer", "language_js": "trl"}
HEADER = ["case", "library", "steps per CPU-second", "lowest", "highest", "ratio", "peak MiB", "of it in training"]


def measure(python: str, library: str, case: str, args: Namespace) -> dict[str, Any]:
    """The figures of a process of library_worker.py."""
    command = [python, str(WORKER), "--library", library, "--case", case]
    command += ["--steps", str(args.steps), "--batch_size", str(args.batch_size)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "typings"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise UserError(f"{library} failed in {python}: {done.stderr.strip().splitlines()[-1]}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def rows_of(case: str, measured: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    """Table rows of a case, with the ratio of this project's speed to the other library's."""
    rates = {library: [1 / run["seconds"] for run in runs] for library, runs in measured.items()}
    medians = {library: statistics.median(values) for library, values in rates.items()}
    rows = []
    for library, runs in measured.items():
        speeds = medians[library], min(rates[library]), max(rates[library])
        peak, growth = (
            statistics.median(values)
            for values in ([run["peak_mib"] for run in runs], [run["peak_mib"] - run["before_mib"] for run in runs])
        )
        ratio = f"{medians[library] / medians[PEERS[case]]:.2f}"
        name = "this project" if library == "kd" else library
        rows.append([case, name, *(f"{speed:.2f}" for speed in speeds), ratio, number(peak), number(growth)])
    return rows


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--library_python", required=True, help="Python with library_requirements.txt installed.")
    parser.add_argument("--cases", nargs="+", default=list(PEERS), choices=list(PEERS), help="What is measured.")
    parser.add_argument("--steps", type=int, default=8, within=Range(2), help="Steps per measurement.")
    parser.add_argument("--batch_size", type=int, default=64, within=Range(2), help="Samples per step.")
    parser.add_argument("--rounds", type=int, default=3, within=Range(1), help="Measurements of each library.")
    parser.add_argument("--json", type=Path, help="File to which all figures are also written.")
    args = parser.parse_args()
    measured: dict[str, dict[str, list[dict[str, Any]]]] = {case: {} for case in args.cases}
    for _ in range(args.rounds):
        for case, runs in measured.items():
            for library, python in (("kd", sys.executable), (PEERS[case], args.library_python)):
                runs.setdefault(library, []).append(measure(python, library, case, args))
                if args.json:
                    args.json.write_text(json.dumps(measured, indent=1))
    versions = {name: version for runs in measured.values() for found in runs.values()
                for name, version in found[0]["versions"].items()}  # fmt: skip
    rows = [row for case, runs in measured.items() for row in rows_of(case, runs)]
    print_rich(HEADER, rows, f"Batch {args.batch_size}, fp32, one thread", json.dumps(versions))


if __name__ == "__main__":
    run(main)
