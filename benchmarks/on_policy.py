"""BLEU of translators on labels, by word and by sequence, and on their own samples, with one teacher.

    python benchmarks/on_policy.py --dataset FOLDER
    python benchmarks/on_policy.py --dataset FOLDER --seeds 0 --max_train_samples 29000 --output_dir runs/whole

All students start from random weights and make the same number of updates. The control is trained again for as many
epochs as fit into the time of the best student, whose time includes its share of the teacher's translations. Times are
those of the stages: run it alone, with OMP_NUM_THREADS=1. Figures are means over the seeds on validation and test;
gains are those over the control on the same seeds, with a 95 % interval. Finished runs are kept, and the same command
continues.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from kd.common.cli import Parser, run
from kd.common.metrics.verdict import verdict_of_gains
from kd.common.reporting.results import RECIPE, RESULTS
from kd.common.reporting.tables import gain_with_interval, markdown
from kd.common.utils.errors import UserError
from kd.common.utils.files import read_json

SCRIPT = Path(__file__).parents[1] / "NLP" / "scripts" / "distill_translation.py"
SHAPES = {
    "teacher_width": 192, "teacher_layers": 3, "student_width": 96, "student_encoder_layers": 3,
    "student_decoder_layers": 1, "vocabulary_size": 6000, "max_length": 96, "dropout": 0.2, "learning_rate": 1e-3,
}  # fmt: skip
METHODS = {
    "word": {"method": "kd"},
    "sequence": {"method": "sequence_kd"},
    "on_policy": {"method": "kd", "on_policy_share": 0.5, "on_policy_start": 0.5, "max_new_tokens": 40},
}
SAME_TIME = "control_same_time"

Results = dict[str, Any]


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--dataset", required=True, help="Dataset of distill_translation.py, such as Multi30k.")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/on_policy"), help="Folder of the runs.")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="Random seeds.")
    parser.add_argument("--max_train_samples", type=int, default=10_000, help="Number of training pairs.")
    parser.add_argument("--max_eval_samples", type=int, help="Number of pairs of validation and of test.")
    parser.add_argument("--teacher_epochs", type=float, default=4, help="Epochs of the teacher.")
    parser.add_argument("--epochs", type=float, default=4, help="Epochs of control and students.")
    args = parser.parse_args()
    shared = SHAPES | {"dataset": args.dataset, "max_train_samples": args.max_train_samples, "report_to": "none"}
    shared |= {"max_eval_samples": args.max_eval_samples, "num_train_epochs": args.epochs, "save_strategy": "no"}
    runs: dict[str, list[Results]] = {}
    for name, flags in METHODS.items():
        first = {"teacher_epochs": args.teacher_epochs} if name == "word" else taught(args.output_dir)
        runs[name] = distill(args.output_dir / name, args.seeds, shared | first | flags)
    best = max(METHODS, key=lambda name: bleu(runs[name], "student").mean())
    ratio = seconds(runs[best], "student") / seconds(runs["word"], "control")
    labels = {"method": "kd", "alpha": 1.0, "num_train_epochs": round(ratio * args.epochs, 2)}
    runs[SAME_TIME] = distill(args.output_dir / SAME_TIME, args.seeds, shared | taught(args.output_dir) | labels)
    print(markdown(*table(runs, best, ratio)))


def taught(folder: Path) -> dict[str, Any]:
    """The flags of the runs after the first one, which share its teacher and its control."""
    return {"teacher": folder / "word" / "stages" / "teacher", "teacher_epochs": 0, "no_control": "true"}


def distill(folder: Path, seeds: list[int], flags: dict[str, Any]) -> list[Results]:
    """The results of a run for each seed. Starts it, or continues it."""
    unused = ("teacher_width", "teacher_layers", "vocabulary_size") if "teacher" in flags else ()
    words = [f"--{name}={value}" for name, value in flags.items() if value is not None and name not in unused]
    words += ["--seeds", *map(str, seeds), "--output_dir", str(folder)]
    if (folder / RECIPE).exists():
        words.append("--resume_from_checkpoint")
    if subprocess.run([sys.executable, SCRIPT, *words]).returncode:
        raise UserError(f"the run in {folder} failed, as shown above: solve that, and repeat the command")
    return [read_json(folder / f"seed{seed}" / RESULTS) for seed in seeds]


def bleu(runs: list[Results], role: str, split: str = "validation", beam: str = "") -> np.ndarray:
    """BLEU (seeds,) of the models of a role."""
    return np.array([run["models"][role]["metrics"][split]["bleu" + beam] for run in runs])


def seconds(runs: list[Results], role: str) -> float:
    """Mean seconds of a stage, for a student with its share of the teacher's translations, which all seeds use."""
    stage = float(np.mean([run["seconds"][role] for run in runs]))
    return stage + (runs[0]["seconds"].get("teacher_outputs", 0.0) / len(runs) if role == "student" else 0.0)


def table(runs: dict[str, list[Results]], best: str, ratio: float) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table."""
    control, head = runs["word"], ["", "validation", "beam", "test", "beam", "gain on validation", "seconds"]
    time = seconds(control, "control")
    rows = [row(role, control, role, control, seconds(control, role)) for role in ("teacher", "control")]
    rows += [row(name, runs[name], "student", control, seconds(runs[name], "student")) for name in METHODS]
    title = f"control, {ratio:.2f} times the epochs ({best})"
    # The time is computed, because the run with alpha 1 calls the teacher too.
    return head, [*rows, row(title, runs[SAME_TIME], "student", control, ratio * time)]


def row(title: str, runs: list[Results], role: str, control: list[Results], time: float) -> list[str]:
    scores = [bleu(runs, role, split, beam) for split in ("validation", "test") for beam in ("", "_beam")]
    gains = bleu(runs, role) - bleu(control, "control")
    gain = gain_with_interval(verdict_of_gains(gains.tolist()), decimals=2)
    return [title, *(f"{score.mean():.2f}" for score in scores), gain, f"{time:.0f}"]


if __name__ == "__main__":
    run(main)
