"""What a search found: search.json, search.md, search.png, a recipe of the best trial, a table."""

import copy
import io
import math
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kd.common.cli import save_recipe
from kd.common.reporting.plots import STYLES
from kd.common.reporting.tables import markdown, number, print_rich
from kd.common.utils.devices import best_device, command, environment
from kd.common.utils.files import write_bytes, write_json, write_text
from kd.nlp.student_model.arguments import PairArguments, Ranges, SearchArguments, TextArguments
from kd.nlp.student_model.search import LOGARITHMIC, Search, Trial, best

AXES = {"alpha": "Weight of the labels α", "temperature": "Temperature T", "learning_rate": "Learning rate"}


@dataclass
class Report:
    """What a search found, in files and in the terminal."""

    text: TextArguments
    args: SearchArguments
    search: Search
    trials: list[Trial]
    control: Trial | None

    def __post_init__(self) -> None:
        data = self.search.texts.data
        self.best, self.training, self.names = best(self.trials), self.search.run.args, list(self.args.ranges)
        self.title = f"Search for {data.name}"
        self.split = next(split for split in data.splits if split.startswith("validation"))
        self.metric = f"{self.split} {data.primary_metric}"

    def write(self) -> None:
        """Writes best.yaml, search.png, search.md and, last, search.json, and prints the table."""
        folder = self.search.run.folder
        best_command = self.write_recipe(folder / "best.yaml")
        words = shlex.join(best_command)
        plot(folder / "search.png", self.metric, self.args.ranges, self.trials, self.control)
        warnings = [f"**Warning:** {text}" for text in self.search.run.warnings]
        write_text(folder / "search.md", "\n\n".join([
            f"# {self.title}", self.headline(), *warnings, markdown(*self.table()), "![Trials](search.png)",
            "To distill with the best of them:", f"```\n{words}\n```",
            "How it was searched:", f"```\n{shlex.join(command())}\n```",
        ]) + "\n")  # fmt: skip
        write_json(folder / "search.json", self.summary() | {"best_command": best_command})
        print_rich(*self.table(), title=self.title, below=f"{self.headline()}\n\n{words}")

    def summary(self) -> dict[str, Any]:
        data, texts = self.search.texts.data, self.search.texts
        return {
            "task": data.name,
            "fingerprint": data.fingerprint,
            "samples": {name: len(rows) for name, rows in texts.splits.items()},
            "split": self.split,
            "metric": data.primary_metric,
            "seed": self.training.seed,
            "ranges": self.args.ranges,
            "best": asdict(self.best),
            "control": self.control and asdict(self.control),
            "trials": [asdict(trial) for trial in self.trials],
            "warnings": self.search.run.warnings,
            "command": command(),
            "environment": environment(self.training.precision, best_device()),
        }

    def headline(self) -> str:
        against = ""
        if self.control and self.control.value is not None:
            gain = self.best.score - self.control.value
            rate = self.control.parameters.get("learning_rate", self.training.learning_rate)
            against = f", {gain:+.4f} against labels only at learning rate {rate:.3g} ({number(self.control.value)})"
        return (
            f"Best {self.metric} of {len(self.trials)} trials: {number(self.best.value)}{against}, on "
            f"{len(self.search.texts.validation):,} texts, seed {self.training.seed}. These texts chose it, which "
            "flatters it: judge it with other seeds, and once on test."
        )

    def write_recipe(self, path: Path) -> list[str]:
        """Writes how distill_classifier.py trains as the trials did, with the best parameters; returns its command."""
        training, pair = copy.copy(self.training), self.args
        for name, value in self.best.parameters.items():
            setattr(training, name, value)
        training.output_dir = str(path.with_suffix(""))
        training.overwrite_output_dir = training.resume_from_checkpoint = False
        training.no_control = not pair.student  # cut from a trained teacher it would have had a teacher
        flags: dict[str, Any] = {
            "teacher": pair.teacher, "student": pair.student, "student_layers": pair.student_layers
        }  # fmt: skip
        save_recipe(path, self.text, PairArguments(align_epochs=0, **flags), training)
        flags = {"dataset": self.text.dataset} | flags | {name: getattr(training, name) for name in AXES}
        words = ["python", "NLP/scripts/distill_classifier.py", str(path)]
        for name, value in flags.items():
            words += [f"--{name}", str(value)] if value is not None else []
        return words

    def table(self) -> tuple[list[str], list[list[str]]]:
        """The trials, best first, then those cut short, then the one on labels alone."""
        ordered = sorted(self.trials, key=lambda trial: (trial.state == "complete", trial.score), reverse=True)
        rows = [self._row(str(trial.number), trial) for trial in ordered]
        if self.control:
            rows.append(self._row("labels only", self.control))
        return ["trial", *self.names, self.metric, "seconds", "state"], rows

    def _row(self, name: str, trial: Trial) -> list[str]:
        values = [f"{trial.parameters[p]:.3g}" if p in trial.parameters else number(None) for p in self.names]
        return [name, *values, number(trial.value), f"{trial.seconds:.1f}", trial.state]


def plot(path: Path, metric: str, ranges: Ranges, trials: list[Trial], control: Trial | None) -> None:
    """The value over trials with the best so far, and against each searched parameter over its range."""
    panels = 1 + len(ranges)
    columns = 2 if panels in (2, 4) else 3
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(7.2, 0.4 + 2.5 * (panels // columns)), dpi=200, layout="constrained")
        grid = figure.subplots(panels // columns, columns, sharey=True, squeeze=False)
        for axes, name in zip(grid.flat, ["", *ranges], strict=True):
            _draw_trials(axes, name, trials, control)
            if name:
                axes.set_xlim(*ranges[name])
            axes.set_xlabel(AXES.get(name, "Trial"))
            axes.grid(alpha=0.25, linewidth=0.6)
        for axes in grid[:, 0]:
            axes.set_ylabel(metric.replace("_", " ").capitalize())
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    write_bytes(path, buffer.getvalue())


def _draw_trials(axes: Axes, name: str, trials: list[Trial], control: Trial | None) -> None:
    """One panel: values against parameter `name`, or against the trial's number where there is no name."""
    for label, complete, marker, colour in (("complete", True, "o", "#0072B2"), ("cut short", False, "x", "#7F7F7F")):
        chosen = [t for t in trials if (t.state == "complete") == complete and t.value is not None]
        if chosen:
            places = [t.parameters[name] if name else t.number for t in chosen]
            axes.scatter(
                places, [t.score for t in chosen], s=18, marker=marker, c=colour, zorder=2, clip_on=False, label=label
            )
    found = best(trials)
    place = found.parameters[name] if name else found.number
    axes.scatter([place], [found.score], s=110, marker="*", c="#E69F00", ec="black", lw=0.6, zorder=3, clip_on=False,
                 label="best")  # fmt: skip
    if control and control.value is not None:
        colour, line, _ = STYLES["control"]
        axes.axhline(control.value, color=colour, linestyle=line, linewidth=1.2, zorder=1, label="labels only")
    if name in LOGARITHMIC:
        axes.set_xscale("log")
    if not name:
        so_far = [max((t.score for t in trials[:i] if t.state == "complete"), default=math.nan)
                  for i in range(1, len(trials) + 1)]  # fmt: skip
        axes.step([t.number for t in trials], so_far, where="post", color=STYLES["student"][0], lw=1.3, zorder=1,
                  label="best so far")  # fmt: skip
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
