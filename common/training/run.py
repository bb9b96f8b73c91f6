"""A run: its folder, its stages and its seeds. A killed run continues where it stopped.

A run is a chain of stages (train the teacher, align the student, ...), each of which results in a model. A finished
stage is saved in `stages/NAME`, complete or not at all; a running one writes checkpoints to `checkpoints/NAME`. Every
stage starts from the run's seed, so its result does not depend on which processes finished the earlier ones.
"""

import copy
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

import datasets
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase, ProgressCallback, set_seed
from transformers.utils import logging as transformers_logging

from kd.common.data.fingerprints import model_fingerprint
from kd.common.metrics.quality import normalized_return
from kd.common.reporting.report import Savable, print_table, save_student, write_report
from kd.common.reporting.results import RECIPE, RESULTS, over_seeds
from kd.common.training.arguments import KDTrainingArguments
from kd.common.training.attention import eager_attention_on_cpu
from kd.common.training.progress import StageProgress
from kd.common.training.run_folder import RUN_FILES, RunFolder, RunSettings, read_mark
from kd.common.training.trainer import KDTrainer
from kd.common.utils.devices import best_device, command, environment
from kd.common.utils.errors import UserError
from kd.common.utils.files import read_json, write_json
from kd.common.utils.folders import CHECKSUMS, find_damage, writing_folder

Model = TypeVar("Model")
Network = TypeVar("Network", bound=nn.Module)

STAGE = "stage.json"


class Run:
    """Opens the output folder of `args` for a new run, or to continue one.

    `instances` are the other argument objects of the script; all of them are saved as the run's recipe. Raises
    UserError where the folder holds another run, or one that was started with other arguments.
    """

    last_file = RESULTS  # a run that has it is finished
    files: tuple[str, ...] = RUN_FILES  # patterns of the files that it writes outside of stages/ and student/
    reports: tuple[str, ...] = (".",)  # folders, inside the run's, with a report each
    may_change: frozenset[str] = frozenset()  # arguments that may be others when the run is continued
    shared_by_seeds = ".."  # where runs in seedN find stages, relative to their folder; may contain {seed}

    def __init__(self, args: RunSettings, *instances: Any) -> None:
        self.args, self.instances, self.folder = args, instances, Path(str(args.output_dir))
        self.history: dict[str, list[dict[str, Any]]] = {}
        self.seconds: dict[str, float] = {}
        self.warnings: list[str] = []
        self.started, self.seconds_before = time.perf_counter(), 0.0
        transformers_logging.disable_progress_bar()  # of loading and saving; training keeps its own
        datasets.disable_progress_bars()
        self._open()

    def _open(self, shared: str | None = None) -> None:
        """Opens the folder. `shared`: another folder, relative to it, whose finished stages this run uses."""
        self._marked: RunFolder | None = None  # in the main process alone, which writes
        with PartialState().main_process_first():
            if PartialState().is_main_process:
                self._marked = RunFolder(self.folder, self.files, shared)
                self._marked.begin(self.args, (self.args, *self.instances), self.last_file, self.may_change)
        shared = read_mark(self.folder).get("shared")
        self.shared = None if shared is None else self.folder / shared

    def each_seed(self) -> Iterator[Self]:
        """A run for each seed of `--seeds`, in the folder `seedN` inside this one; without `--seeds` this run itself.
        Runs that are finished are skipped.

        They share the stages that this run has built before, such as the teacher, with their times, and its warnings
        and checked inputs.
        """
        if self.args.seeds is None:
            yield self
            return
        for seed in self.args.seeds:
            files = [self.folder / f"seed{seed}" / name for name in (RECIPE, self.last_file)]
            begun, finished = broadcast_object_list([file.exists() for file in files])  # the same in all processes
            run = self._of_seed(seed, resume=begun)
            if not finished:
                yield run

    def _of_seed(self, seed: int, resume: bool) -> Self:
        run = copy.copy(self)
        run.folder = self.folder / f"seed{seed}"
        run.args = copy.copy(self.args)
        run.args.seed, run.args.seeds, run.args.output_dir = seed, None, str(run.folder)
        run.args.resume_from_checkpoint, run.args.overwrite_output_dir = resume, False
        run.history, run.seconds, run.warnings = dict(self.history), dict(self.seconds), list(self.warnings)
        run.started, run.seconds_before = time.perf_counter(), sum(self.seconds.values())
        run._open(self.shared_by_seeds.format(seed=seed))
        if self._marked is not None and run._marked is not None:
            inputs = {name: value for name, value in self._marked.fingerprints.items() if name != RECIPE}
            run._marked.check_inputs(**inputs)
        return run

    def summarize(self) -> None:
        """Several seeds: writes results.json and report.md with means and standard deviations, and copies the student
        of the first seed; prints the table. Only in the main process.
        """
        if self.args.seeds is None or not PartialState().is_main_process:
            return
        for name in self.reports:
            folder, runs = self.folder / name, [self.folder / f"seed{seed}" / name for seed in self.args.seeds]
            results = over_seeds([read_json(run / RESULTS) for run in runs]) | {"command": command()}
            results["seconds"]["total"] = self.total_seconds
            if (runs[0] / "student").exists():
                with writing_folder(folder / "student") as partial:
                    shutil.copytree(
                        runs[0] / "student", partial, ignore=shutil.ignore_patterns(CHECKSUMS), dirs_exist_ok=True
                    )
            write_report(folder, results, None)
            print_table(results)
            print(f"report:  {folder / 'report.md'}")

    def check_inputs(self, data: str, **models: nn.Module | PreTrainedTokenizerBase | None) -> None:
        """Stores the fingerprints of the inputs that the run began with: data (its fingerprint), and pretrained models
        and tokenizers by role. None for a model that the run trains itself.

        Raises UserError where a run that is continued began with others.
        """
        if self._marked is not None:
            begun = {role: model_fingerprint(model) for role, model in models.items() if model is not None}
            self._marked.check_inputs(data=data, **begun)

    def stage(
        self,
        name: str,
        build: Callable[[], Model],
        load: Callable[[str], Model],
        processor: Any = None,
    ) -> Model:
        """The model of a stage: loaded if the stage is finished, otherwise built, timed and saved with its
        `processor` (tokenizer or image processor). Both have a `save_pretrained`.
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
                write_json(
                    partial / STAGE, {"seconds": self.seconds[name], "history": self.history.setdefault(name, [])}
                )
            self._remove_checkpoints(name)
        PartialState().wait_for_everyone()
        return model

    def stage_folder(self, name: str) -> Path:
        """Where a stage is stored: in the `shared` folder if it is there already, otherwise in the run's."""
        if self.shared is not None and (self.shared / "stages" / name).exists():
            return self.shared / "stages" / name
        return self.folder / "stages" / name

    def _remove_checkpoints(self, name: str) -> None:
        """Those of a finished stage; a run that was killed meanwhile does it when it is continued."""
        if self._marked is not None:
            self._marked.remove_below(f"checkpoints/{name}")

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the time of a block to `seconds[name]`, without the time of timed blocks inside it."""
        started, others = time.perf_counter(), sum(self.seconds.values())
        yield
        inside = sum(self.seconds.values()) - others
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started - inside

    def warn(self, text: str | None) -> None:
        """Prints a warning, if there is one, in the main process, and keeps it for the report."""
        if text and text not in self.warnings:
            self.warnings.append(text)
            if PartialState().is_main_process:
                print(f"warning: {text}", file=sys.stderr)

    @property
    def total_seconds(self) -> float:
        """Since the start of the run. Earlier processes of a resumed run count with the stages that they finished."""
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
        **extra: Any,
    ) -> dict[str, Any]:
        """The run's results.json: `models` are the entries of teacher, control, student (or None) and any others,
        `split` and `metric` name the headline, `floor` is the metric's value for no skill at all (retention counts
        from there), `extra` is shown in the report too. If `lower_is_better`, such as for a perplexity, retention is
        teacher / student and the gain is control - student, so more is better for both.
        """
        score = {role: m["metrics"][split][metric] for role, m in models.items() if m}
        student, teacher, control = (score.get(role) for role in ("student", "teacher", "control"))
        retention = gain = None
        if student is not None and teacher is not None:
            retention = teacher / student if lower_is_better else normalized_return(student, floor, teacher)
        if student is not None and control is not None:
            gain = control - student if lower_is_better else student - control
        seconds = {role: sum(s for name, s in self.seconds.items() if name.removesuffix("_encoder") == role)
                   for role in ("teacher", "teacher_outputs", "control", "student")}  # fmt: skip
        return {
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

    def finish(
        self, results: dict[str, Any], student: Savable, usage: str, processor: Savable | None = None, **metadata: Any
    ) -> None:
        """In the main process: writes the student's folder and the report, and prints the table. Arguments are those
        of `model_card.save_student`.
        """
        if PartialState().is_main_process:
            save_student(self.folder / "student", student, results, usage, processor, **metadata)
            write_report(self.folder, results, self.history)
            print_table(results)
            print(f"student: {self.folder / 'student'}\nreport:  {self.folder / 'report.md'}")


class TrainerRun(Run):
    """A run whose stages are trained by KDTrainer."""

    args: KDTrainingArguments

    def train(self, name: str, model: Network, settings: dict[str, Any], **trainer: Any) -> Network:
        """Trains the model of a stage, from its last checkpoint on. `settings` are training arguments of this stage
        that differ from the run's, `trainer` the arguments of KDTrainer.
        """
        args = copy.copy(self.args)
        args.output_dir = str(self.folder / "checkpoints" / name)
        if trainer.get("eval_dataset") is None:
            args.eval_strategy = "no"
        for setting, value in settings.items():
            setattr(args, setting, value)
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(self.folder / "tensorboard" / name)  # what its callback reads
        trained = copy.deepcopy(model) if args.fsdp else model  # FSDP leaves a model in shards, for good
        loop = KDTrainer(model=trained, args=args, **trainer)
        if loop.pop_callback(ProgressCallback):  # not in notebooks, which have one of their own
            loop.add_callback(StageProgress(name.replace("_", " ")))
        with eager_attention_on_cpu(trained, trainer["train_dataset"], args.precision, best_device().type):
            loop.train(resume_from_checkpoint=args.resume_from_checkpoint)
        loop.finish()
        if args.fsdp:
            model.load_state_dict(full_state(trained))
        self.history[name] = loop.state.log_history
        return model


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """The complete weights, in each process, of a model that may be sharded over several."""
    return {n: w.full_tensor() if isinstance(w, DTensor) else w for n, w in model.state_dict().items()}
