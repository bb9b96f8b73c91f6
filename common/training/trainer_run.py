"""Runs whose stages are trained by KDTrainer, and their progress."""

import copy
import math
import os
from typing import Any, TypeVar

from torch import nn
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from kd.common.training.arguments import KDTrainingArguments
from kd.common.training.inference import eager_attention_on_cpu
from kd.common.training.run import Run
from kd.common.training.trackers import wandb_run
from kd.common.training.trainer import KDTrainer
from kd.common.utils.devices import best_device

Network = TypeVar("Network", bound=nn.Module)
TIMES = frozenset({"runtime", "samples_per_second", "steps_per_second"})


class TrainerRun(Run):
    """A run whose stages are trained by KDTrainer."""

    args: KDTrainingArguments

    def train(
        self, name: str, model: Network, overrides: dict[str, Any], samples: int | None = None, **trainer: Any
    ) -> Network:
        """Trains the model of a stage, starting from its last checkpoint.

        Args:
            overrides: Training arguments of this stage that differ from those of the run.
            samples: Number of samples in an epoch; default: those of the training data. A stage that trains on some of
                them makes as many updates as one that trains on all.
            trainer: Arguments of KDTrainer.
        """
        args = copy.copy(self.args)
        args.output_dir = str(self.folder / "checkpoints" / name)
        if trainer.get("eval_dataset") is None:
            args.eval_strategy = "no"
        for argument, value in overrides.items():
            setattr(args, argument, value)
        if samples is not None and samples != len(trainer["train_dataset"]):
            count_epochs_in(args, samples)
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(self.folder / "tensorboard" / name)  # its callback reads this
        args.run_name = f"{args.run_name or self.folder}/{name}"  # W&B has a run for each stage
        trained = copy.deepcopy(model) if args.fsdp else model  # FSDP shards a model permanently
        loop = KDTrainer(model=trained, args=args, **trainer)
        popped = loop.pop_callback(PrinterCallback if args.disable_tqdm else ProgressCallback)  # not in notebooks
        if popped and not (self.quiet and args.disable_tqdm):
            loop.add_callback(StageProgress(name.replace("_", " ")))
        try:
            attention = eager_attention_on_cpu(trained, trainer["train_dataset"], args.precision, best_device().type)
            trackers = (args.report_to or []) if args.process_index == 0 else []
            with attention, wandb_run(trackers, self.folder):
                loop.train(resume_from_checkpoint=args.resume_from_checkpoint)
        finally:
            loop.finish()  # after an interrupt in a notebook, the teacher is used again
        if args.fsdp:  # all weights, in each process
            weights = trained.state_dict().items()
            model.load_state_dict({n: w.full_tensor() if isinstance(w, DTensor) else w for n, w in weights})
        self.history[name] = loop.state.log_history
        return model


def count_epochs_in(args: KDTrainingArguments, samples: int) -> None:
    """Sets the length of a training, and what happens after each epoch, to the updates of epochs of `samples`."""
    batch = args.train_batch_size * args.world_size
    batches = samples // batch if args.dataloader_drop_last else -(-samples // batch)
    updates = max(1, -(-batches // args.gradient_accumulation_steps))
    if args.max_steps <= 0:
        args.max_steps = math.ceil(args.num_train_epochs * updates)
    for name in ("eval", "logging", "save"):
        if getattr(args, f"{name}_strategy") == "epoch":
            setattr(args, f"{name}_strategy", IntervalStrategy.STEPS if name != "save" else SaveStrategy.STEPS)
            setattr(args, f"{name}_steps", updates)


class StageProgress(ProgressCallback):
    """Prints logs as readable lines and, on a terminal, a progress bar with the name of the stage."""

    training_bar: Any  # None before and after training, and in all processes but the main one

    def __init__(self, stage: str) -> None:
        super().__init__()
        self.stage = stage

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            off = True if args.disable_tqdm else None  # None: off unless stderr is a terminal
            self.training_bar = tqdm(total=state.max_steps, desc=self.stage, dynamic_ncols=True, disable=off)
        self.current_step = 0

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kw: Any) -> None:
        if self.training_bar is not None and not self.training_bar.disable:
            super().on_prediction_step(args, state, control, eval_dataloader, **kw)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs is not None:
            self.training_bar.write(f"{self.stage}, {log_line(logs)}")


def log_line(logs: dict[str, Any]) -> str:
    """Formats logs as `epoch 2: loss 1.18 (task 1.10, soft targets 0.08)`, as `epoch 2: evaluation accuracy 0.49, f1
    0.42`, or as the duration of the training.
    """
    if "train_runtime" in logs:
        return f"{logs['train_runtime']:.0f} s, {logs['train_samples_per_second']:.0f} samples per second"
    prefix = "loss_" if "loss" in logs else "eval_"
    figures = ", ".join(
        f"{name.removeprefix(prefix).replace('_', ' ')} {value:.4g}"
        for name, value in logs.items()
        if name.startswith(prefix) and isinstance(value, int | float) and name.removeprefix(prefix) not in TIMES
    )
    if prefix == "loss_":
        figures = f"loss {logs['loss']:.4g}" + (f" ({figures})" if figures else "")
    else:
        figures = f"evaluation {figures}"
    return f"epoch {logs.get('epoch', 0):.3g}: {figures}"
