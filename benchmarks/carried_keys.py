"""When carried keys pay: keys fitted to few or other texts, and codes that a student and its teacher share.

    python benchmarks/carried_keys.py runs/NLP/keys_carried_seed* --dataset clinc_oos --others trec sst5

Reads finished runs of distill_keys_carried.sh on one dataset, one per seed, as key_study.py does. Two tables:

- Validation accuracy of a student whose keys are carried, random, or fitted to all, 1,000, 100 or 20 texts without
  labels, or to the texts of other datasets. The values are trained on cached codes with 20 or 5 labels per
  class, or are those of the teacher. Gains of carried keys have 95 % intervals (paired t over the runs).
- A store of the teacher's codes or embeddings that is searched with those of the student: how often the nearest of all
  validation texts is the same text (recall@1), and the nearest training text has the right label.

The keys of teacher and student are fitted with different seeds, except in the row `new keys, same texts and seed`.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from code_retrieval import BYTES, OTHER_SEED, RECALL, Scores, representations, retrieval_table
from key_models import KeyStudy, Setting, embed_rows
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from kd.common.cli import Parser, run
from kd.common.metrics.verdict import verdict_of_gains
from kd.common.reporting.plots import PAPER, STYLES, save_figure
from kd.common.reporting.tables import gain_with_interval, markdown, mean_and_deviation
from kd.common.training.arguments import Keys
from kd.common.utils.files import write_text
from kd.nlp.data.sentences import load_sentences, tokenize

TEXTS = 20, 100, 1_000  # to which new keys are fitted
SETTINGS = {
    "20 labels per class": Setting("20 labels per class, linear decoder", labels=20),
    "5 labels per class": Setting("5 labels per class, mean decoder", "mean", labels=5),
}
REUSED = "the teacher's values, no labels"
CARRIED, ALL, RANDOM = "carried", "new: all texts", "random"


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="Folders of finished runs of distill_keys_carried.sh.")
    parser.add_argument("--dataset", required=True, help="Dataset of the runs.")
    parser.add_argument("--others", nargs="*", default=[], help="Datasets whose texts keys are fitted to as well.")
    parser.add_argument("--markdown", type=Path, help="File to which the tables are also written.")
    parser.add_argument("--figure", type=Path, help="File of the figure (.png).")
    args = parser.parse_args()
    others = {Path(name).name: load_sentences([name], None, args.dataset).texts for name in args.others}
    accuracies: Scores = defaultdict(lambda: defaultdict(list))
    retrieved: Scores = defaultdict(lambda: defaultdict(list))
    for seed, folder in enumerate(args.runs):
        study = KeyStudy(folder, args.dataset, seed)
        for source in tqdm(list(sources(study, others)), desc=str(folder)):
            for column, accuracy in accuracies_of(study, source).items():
                accuracies[source.title][column].append(accuracy)
        for representation in representations(study):
            for column, score in representation.scores(study).items():
                retrieved[representation.title][column].append(score)
    tables = "\n\n".join([markdown(*accuracy_table(accuracies)), markdown(*retrieval_table(retrieved))])
    if args.markdown:
        write_text(args.markdown, tables + "\n")
    if args.figure:
        plot(args.figure, accuracies, retrieved, len(study.labels))
    print(tables)


# ---------------------------------------------------------------- accuracy


@dataclass(frozen=True)
class Source:
    """Where the keys of a student come from: embeddings (rows, width) for new keys."""

    title: str
    keys: Keys
    fitted_to: Tensor | None = None


def sources(study: KeyStudy, others: dict[str, list[str]]) -> Iterator[Source]:
    train = study.student[True].train
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(study.seed))
    yield Source(CARRIED, "carried")
    yield Source(ALL, "new")
    for number in reversed(TEXTS):
        if number < len(train):
            yield Source(new_title(number), "new", train[order[:number]])
    for name, texts in others.items():
        rows = tokenize(texts, study.texts.collate.tokenizer)
        yield Source(
            f"new: {len(texts):,} texts of {name}", "new", embed_rows(study.encoder, rows, study.texts.collate)
        )
    yield Source(RANDOM, "random")


def new_title(texts: int) -> str:
    return f"new: {texts:,} texts"


def accuracies_of(study: KeyStudy, source: Source) -> dict[str, float]:
    """Validation accuracies of students with these keys, by column."""
    found, validation = {}, study.student[True].validation
    for column, setting in SETTINGS.items():
        student = study.student_bottleneck(setting, source.keys, source.fitted_to, study.seed + OTHER_SEED)
        with torch.no_grad():
            found[column] = study.validation_accuracy(student(validation))
            if setting.decoder == "linear":
                teacher, _ = study.teacher_bottleneck(setting.decoder, setting.codebook_size)
                found[REUSED] = study.validation_accuracy(teacher.decode(student.encode(validation)))
    return found


def accuracy_table(accuracies: Scores) -> tuple[list[str], list[list[str]]]:
    header, rows = ["keys"], []
    for column in SETTINGS:
        header += [column, "gain of carried keys"]
    for title, row in accuracies.items():
        cells = [title]
        for column in SETTINGS:
            gains = [ours - other for ours, other in zip(accuracies[CARRIED][column], row[column], strict=True)]
            gain = "" if title == CARRIED else gain_with_interval(verdict_of_gains(gains))
            cells += [mean_and_deviation(row[column]), gain]
        rows.append([*cells, mean_and_deviation(row[REUSED])])
    return [*header, REUSED], rows


# ---------------------------------------------------------------- figure


def plot(path: Path, accuracies: Scores, retrieved: Scores, texts: int) -> None:
    """Left: accuracy against the number of texts that keys are fitted to. Right: recall@1 in the teacher's store."""
    with matplotlib.rc_context(PAPER):
        figure = Figure(figsize=(9.6, 3.4), dpi=200, layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
        plot_accuracies(left, accuracies, texts)
        plot_recall(right, retrieved)
        save_figure(figure, path)


def plot_accuracies(axes: Axes, accuracies: Scores, texts: int) -> None:
    points = {number: row for number in TEXTS if (row := accuracies.get(new_title(number)))} | {texts: accuracies[ALL]}
    for column, (colour, _, marker) in zip(SETTINGS, (STYLES["teacher"], STYLES["control"]), strict=True):
        means, deviations = zip(*(mean_of(row[column]) for row in points.values()), strict=True)
        axes.errorbar(list(points), means, deviations, color=colour, marker=marker, capsize=2, label=f"new, {column}")
        for title, line in ((CARRIED, "--"), (RANDOM, ":")):
            mean, _ = mean_of(accuracies[title][column])
            axes.axhline(mean, color=colour, linestyle=line, label=f"{title}, {column}")
    axes.set(xscale="log", xlabel="Texts to which new keys are fitted", ylabel="Validation accuracy")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.legend(frameon=False, fontsize=7)


def plot_recall(axes: Axes, retrieved: Scores) -> None:
    rows = {
        f"{title} ({row[BYTES][0]:,.0f} B)": mean_of(row[RECALL]) for title, row in retrieved.items() if row[RECALL]
    }
    means, deviations = zip(*rows.values(), strict=True)
    bars = axes.barh(list(rows), means, xerr=deviations, color=STYLES["student"][0], error_kw={"capsize": 2})
    axes.bar_label(bars, [f" {mean:.3f}" for mean in means], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.15), xlabel="Recall@1 of the same text in the teacher's store")


def mean_of(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation (0 of a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    run(main)
