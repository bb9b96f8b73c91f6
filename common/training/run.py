"""A run: its folder, its stages and its seeds. A killed run continues where it stopped.

A run is a sequence of stages (train the teacher, align the student, ...), each of which produces a model. A finished
stage is saved atomically in `stages/NAME`; a running stage writes checkpoints to `checkpoints/NAME`. Each stage starts
from the run's seed, so its result does not depend on whether earlier stages were computed or loaded.
"""

import copy
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

import datasets
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.utils import logging as transformers_logging

from kd.common.data.fingerprints import model_fingerprint
from kd.common.metrics.quality import normalized_return
from kd.common.metrics.verdict import Measurement
from kd.common.reporting.model_card import Card, Savable, save_student, with_seeds
from kd.common.reporting.origins import CARD
from kd.common.reporting.report import print_table, write_report
from kd.common.reporting.results import (
    RECIPE,
    RESULTS,
    over_seeds,
    retention_interval,
    score_of_outputs,
    verdict_of_run,
)
from kd.common.training.arguments import RunArguments
from kd.common.training.run_folder import RUN_FILES, RunFolder, read_mark
from kd.common.utils.devices import best_device, command, environment
from kd.common.utils.errors import UserError
from kd.common.utils.files import CHECKSUMS, find_damage, read_json, write_json, write_text, writing_folder

Model = TypeVar("Model")

STAGE = "stage.json"


class Run:
    """Opens the output folder of `args` for a new run, or to continue one.

    Args:
        instances: The other argument objects of the script. All arguments are saved as the run's recipe.

    Raises UserError if the folder contains another run, or one that was started with other arguments.
    """

    last_file = RESULTS  # a run with this file is finished
    files: tuple[str, ...] = RUN_FILES  # patterns of the files that a run writes outside of stages/ and student/
    reports: tuple[str, ...] = (".",)  # folders with a report, relative to the run's folder
    may_change: frozenset[str] = frozenset()  # arguments that may change when the run is continued
    quiet = False  # prints no table, and with disable_tqdm no progress
    plots = True  # draws curves.png
    shared_by_seeds = ".."  # folder with the stages that seed runs share, relative to theirs; may contain {seed}

    def __init__(self, args: RunArguments, *instances: Any) -> None:
        self.args, self.instances, self.folder = args, instances, Path(str(args.output_dir))
        self.history: dict[str, list[dict[str, Any]]] = {}
        self.seconds: dict[str, float] = {}
        self.warnings: list[str] = []
        self.started, self.seconds_before = time.perf_counter(), 0.0
        transformers_logging.disable_progress_bar()  # hides bars of loading and saving; training has a bar
        datasets.disable_progress_bars()
        self._open()

    def _open(self, shared: str | None = None) -> None:
        """Opens the folder. `shared` is another folder, relative to it, whose finished stages this run uses."""
        self._run_folder: RunFolder | None = None  # set in the main process only, which writes all files
        with PartialState().main_process_first():
            if PartialState().is_main_process:
                self._run_folder = RunFolder(self.folder, self.files, shared)
                self._run_folder.begin(self.args, (self.args, *self.instances), self.last_file, self.may_change)
        shared = read_mark(self.folder).get("shared")
        self.shared = None if shared is None else self.folder / shared

    def each_seed(self) -> Iterator[Self]:
        """Yields a run for each seed of `--seeds`, in the folder `seedN` inside this one, or this run without
        `--seeds`. Finished seed runs are skipped.

        Seed runs share the finished stages of this run, such as the teacher, with their times, and its warnings and
        input fingerprints.
        """
        if self.args.seeds is None:
            yield self
            return
        for seed in self.args.seeds:
            files = [self.folder / f"seed{seed}" / name for name in (RECIPE, self.last_file)]
            begun, finished = broadcast_object_list([file.exists() for file in files])  # the same in all processes
            run = self._seed_run(seed, resume=begun)
            if not finished:
                yield run

    def _seed_run(self, seed: int, resume: bool) -> Self:
        run = copy.copy(self)
        run.folder = self.folder / f"seed{seed}"
        run.args = copy.copy(self.args)
        run.args.seed, run.args.seeds, run.args.output_dir = seed, None, str(run.folder)
        run.args.resume_from_checkpoint, run.args.overwrite_output_dir = resume, False
        run.history, run.seconds, run.warnings = dict(self.history), dict(self.seconds), list(self.warnings)
        run.started, run.seconds_before = time.perf_counter(), sum(self.seconds.values())
        run._open(self.shared_by_seeds.format(seed=seed))
        if self._run_folder is not None and run._run_folder is not None:
            inputs = {name: value for name, value in self._run_folder.fingerprints.items() if name != RECIPE}
            run._run_folder.check_inputs(**inputs)
        return run

    def summarize(self) -> None:
        """Writes results.json and report.md with means and standard deviations over several seeds, copies the first
        seed's student, and prints the table, in the main process. Does nothing without `--seeds`.
        """
        if self.args.seeds is None or not PartialState().is_main_process:
            return
        for name in self.reports:
            folder, runs = self.folder / name, [self.folder / f"seed{seed}" / name for seed in self.args.seeds]
            results = over_seeds([read_json(run / RESULTS) for run in runs]) | {"command": command()}
            results["seconds"]["total"] = self.total_seconds
            if (student := runs[0] / "student").exists():
                with writing_folder(folder / "student") as partial:
                    shutil.copytree(student, partial, ignore=shutil.ignore_patterns(CHECKSUMS), dirs_exist_ok=True)
                    card = (student / CARD).read_text(encoding="utf-8")
                    write_text(partial / CARD, with_seeds(card, read_json(runs[0] / RESULTS), results))
            write_report(folder, results, None)
            self.show(results, folder)

    def check_inputs(self, data: str, **models: nn.Module | PreTrainedTokenizerBase | None) -> None:
        """Stores the fingerprints of the run's inputs.

        Args:
            data: Fingerprint of the data.
            models: Pretrained models and tokenizers by role; None for a model that the run trains.

        Raises UserError if the run is continued and was started with other inputs.
        """
        if self._run_folder is not None:
            roles = {role: model_fingerprint(model) for role, model in models.items() if model is not None}
            self._run_folder.check_inputs(data=data, **roles)

    def stage(
        self, name: str, build: Callable[[], Model], load: Callable[[str], Model], processor: Any = None
    ) -> Model:
        """Returns the model of a stage. If the stage is finished, the model is loaded; otherwise it is built, timed
        and saved with its `processor` (tokenizer or image processor). Both must have `save_pretrained`.
        """
        folder = self.stage_folder(name)
        if (folder / CHECKSUMS).exists() or (folder / STAGE).exists():
            if damage := find_damage(folder):
                raise UserError(f"{damage}: remove {folder}, then --resume_from_checkpoint trains that stage again")
            self._remove_checkpoints(name)
            model, record = load(str(folder)), read_json(folder / STAGE)
            self.seconds[name], self.history[name] = record["seconds"], record["history"]
            self.seconds_before += record["seconds"]
            return model
        set_seed(self.args.seed)
        with self.timed(name):
            model = build()
        if PartialState().is_main_process:
            with writing_folder(folder) as partial:
                model.save_pretrained(partial)  # type: ignore[attr-defined]
                if processor is not None:
                    processor.save_pretrained(partial)
                record = {"seconds": self.seconds[name], "history": self.history.setdefault(name, [])}
                write_json(partial / STAGE, record)
            self._remove_checkpoints(name)
        PartialState().wait_for_everyone()
        return model

    def stage_folder(self, name: str) -> Path:
        """The folder of a stage: in the `shared` folder if it exists there, otherwise in the run's folder."""
        if self.shared is not None and (self.shared / "stages" / name).exists():
            return self.shared / "stages" / name
        return self.folder / "stages" / name

    def _remove_checkpoints(self, name: str) -> None:
        """Removes the checkpoints of a finished stage. A run that was killed before that removes them when resumed."""
        if self._run_folder is not None:
            self._run_folder.remove_below(f"checkpoints/{name}")

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the time of a block to `seconds[name]`, without the time of timed blocks inside it."""
        started, others = time.perf_counter(), sum(self.seconds.values())
        yield
        inside = sum(self.seconds.values()) - others
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started - inside

    def argument(self, name: str) -> Any:
        """The value of an argument of the script; None if it has no such argument."""
        return next((getattr(one, name) for one in (self.args, *self.instances) if hasattr(one, name)), None)

    def warn(self, text: str | None) -> None:
        """Prints a warning once, in the main process, and stores it for the report. None is ignored."""
        if text and text not in self.warnings:
            self.warnings.append(text)
            if PartialState().is_main_process:
                print(f"warning: {text}", file=sys.stderr)

    @property
    def total_seconds(self) -> float:
        """Seconds since the start of the run. A resumed run adds the seconds of stages that it loads."""
        return time.perf_counter() - self.started + self.seconds_before

    def results(
        self,
        domain: str,
        task: str,
        method: str,
        data: dict[str, Any],
        models: dict[str, Any],
        split: str,
        metric: str,
        floor: float = 0.0,
        lower_is_better: bool = False,
        measurements: Mapping[str, Measurement] | None = None,
        **extra: Any,
    ) -> dict[str, Any]:
        """The content of the run's results.json.

        Args:
            models: Entries of teacher, control, student (or None) and any other models.
            split, metric: Split and name of the primary metric.
            floor: Value of the metric for a model without any skill, at which retention is zero.
            lower_is_better: Whether a lower metric is better, as for perplexity. Retention is then teacher / student
                and the gain is control - student, so that higher is better for both.
            measurements: The primary metric by role, on any of its evaluation examples, for the verdict.
            extra: Additional entries, which the report includes.
        """
        score = {role: m["metrics"][split][metric] for role, m in models.items() if m}
        student, teacher, control = (score.get(role) for role in ("student", "teacher", "control"))
        if teacher is None:
            teacher = score_of_outputs(extra.get("teacher_outputs"), split, metric, data)
        retention = gain = None
        if student is not None and teacher is not None:
            retention = teacher / student if lower_is_better else normalized_return(student, floor, teacher)
        if student is not None and control is not None:
            gain = control - student if lower_is_better else student - control
        seconds = {role: sum(s for name, s in self.seconds.items() if name.removesuffix("_encoder") == role)
                   for role in ("teacher", "teacher_outputs", "control", "student")}  # fmt: skip
        results: dict[str, Any] = {
            "schema_version": 1,
            "domain": domain,
            "task": task,
            "method": method,
            "seed": self.args.seed,
            "command": command(),
            "data": data,
            "models": {role: models.get(role) for role in ("teacher", "control", "student")} | models,
            "primary_metric": {"split": split, "name": metric},
            "retention": retention,
            "floor": floor,
            "lower_is_better": lower_is_better,
            "gain_over_control": gain,
            "seconds": seconds | {"total": self.total_seconds},
            "environment": environment(self.args.precision, best_device()),
            "warnings": self.warnings,
            **extra,
        }
        if measurements and "student" in measurements:
            results["verdict"] = verdict_of_run(results, measurements, self.args.margin)
        return results | {"retention_interval": retention_interval(results)}

    def finish(
        self, results: dict[str, Any], student: Savable | None, card: Card, processor: Savable | None = None
    ) -> None:
        """Writes the student's folder, if there is a student, and the report, and prints the table, in the main
        process. See `model_card.save_student` for the arguments.
        """
        if PartialState().is_main_process:
            if student is not None:
                save_student(self.folder / "student", student, results, card, processor)
            write_report(self.folder, results, self.history if self.plots else None)
            self.show(results)

    def show(self, results: dict[str, Any], folder: Path | None = None) -> None:
        """Prints the results and where they are: in `folder`, by default that of the run."""
        if not self.quiet:
            folder = folder or self.folder
            print_table(results)
            if (folder / "student").exists():
                print(f"student: {folder / 'student'}")
            elif results["models"]["student"] is None and (self.folder / "stages" / "teacher").exists():
                print(f"teacher: {self.folder / 'stages' / 'teacher'}")
            print(f"report:  {folder / 'report.md'}")
