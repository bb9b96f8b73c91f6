"""When does carrying keys pay? A student's bottleneck under every kind of keys, in settings where they may matter.

    python NLP/scripts/study_keys.py runs/NLP/keys_carried_seed* --dataset clinc_oos --markdown keys.md

Takes finished runs of distill_keys_carried.sh on one dataset (one per seed): their encoders, aligned or not, embed the
texts once; then each cell trains only values, in seconds. Cells: the student's validation accuracy, mean and standard
deviation over the runs.
"""

import statistics
from collections import defaultdict
from pathlib import Path

from tqdm import tqdm

from kd.common.cli import Parser, run
from kd.common.utils.files import write_text
from kd.nlp.student_model.key_study import GROUPS, KEYS, SETTINGS, KeyStudy


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="finished runs of distill_keys_carried.sh")
    parser.add_argument("--dataset", required=True, help="the dataset of those runs")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    cells: dict[tuple[str, str], list[float]] = defaultdict(list)
    probes = []
    for folder in args.runs:
        study = KeyStudy(folder, args.dataset)
        probes.append(study.linear_probe_one_after_another())
        for setting in tqdm(SETTINGS, desc=str(folder)):
            for keys in KEYS:
                if keys != "reused" or (setting.labels is None and not setting.one_after_another):
                    cells[setting.title, keys].append(study.accuracy(setting, keys))
    lines = [
        f"| validation accuracy, {len(args.runs)} runs | " + " | ".join(KEYS) + " |",
        "|---|" + "---|" * len(KEYS),
    ]
    for setting in SETTINGS:
        row = [spread(cells[setting.title, keys]) for keys in KEYS]
        lines.append(f"| {setting.title} | " + " | ".join(row) + " |")
    lines.append(f"\nLinear probe, classes in {GROUPS} groups one after another: {spread(probes)}.")
    if args.markdown:
        write_text(args.markdown, "\n".join(lines) + "\n")
    print("\n".join(lines))


def spread(values: list[float]) -> str:
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean


if __name__ == "__main__":
    run(main)
