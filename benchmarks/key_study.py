"""Accuracy of a student's bottleneck with carried, new, random and reused keys, in several settings.

    python benchmarks/key_study.py runs/NLP/keys_carried_seed* --dataset clinc_oos --markdown keys.md

Reads finished runs of distill_keys_carried.sh on one dataset, one per seed. Their encoders, with and without
alignment, embed the texts once. Then only the values are trained for each combination of setting and keys, which takes
seconds. The table contains the mean and standard deviation of the student's validation accuracy over the runs.
`carried_keys.py` studies students that cannot fit keys well, and codes that student and teacher share.
"""

from collections import defaultdict
from pathlib import Path
from typing import get_args

from key_models import GROUPS, KeyStudy, Setting
from tqdm import tqdm

from kd.common.cli import Parser, run
from kd.common.reporting.tables import mean_and_deviation
from kd.common.training.arguments import Keys
from kd.common.utils.files import write_text

KEYS = get_args(Keys)

SETTINGS = [
    Setting("all labels, linear decoder, K = 512"),
    Setting("all labels, mean decoder, K = 512", "mean"),
    Setting("linear decoder, K = 64", codebook_size=64),
    Setting("linear decoder, K = 16", codebook_size=16),
    Setting("mean decoder, K = 16", "mean", codebook_size=16),
    Setting("20 labels per class, linear decoder", labels=20),
    Setting("5 labels per class, linear decoder", labels=5),
    Setting("5 labels per class, mean decoder", "mean", labels=5),
    Setting("no alignment, linear decoder", aligned=False),
    Setting("no alignment, 5 labels per class, mean decoder", "mean", labels=5, aligned=False),
    Setting("classes in 10 groups, one after another, mean decoder", "mean", one_after_another=True),
]


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="Folders of finished runs of distill_keys_carried.sh.")
    parser.add_argument("--dataset", required=True, help="Dataset of the runs.")
    parser.add_argument("--markdown", type=Path, help="File to which the table is also written.")
    args = parser.parse_args()
    accuracies: dict[tuple[str, str], list[float]] = defaultdict(list)
    probes = []
    for folder in args.runs:
        study = KeyStudy(folder, args.dataset)
        probes.append(study.linear_probe_one_after_another())
        for setting in tqdm(SETTINGS, desc=str(folder)):
            for keys in KEYS:
                if keys != "reused" or (setting.labels is None and not setting.one_after_another):
                    accuracies[setting.title, keys].append(study.accuracy(setting, keys))
    table = [
        f"| validation accuracy, {len(args.runs)} runs | " + " | ".join(KEYS) + " |",
        "|---|" + "---|" * len(KEYS),
    ]
    for setting in SETTINGS:
        row = [mean_and_deviation(accuracies[setting.title, keys]) for keys in KEYS]
        table.append(f"| {setting.title} | " + " | ".join(row) + " |")
    table.append(f"\nLinear probe, classes in {GROUPS} groups one after another: {mean_and_deviation(probes)}.")
    if args.markdown:
        write_text(args.markdown, "\n".join(table) + "\n")
    print("\n".join(table))


if __name__ == "__main__":
    run(main)
