"""What a training shows while it runs: a bar that names its stage, and a line for each thing that is logged."""

from typing import Any

from transformers import ProgressCallback

TIMES = frozenset({"runtime", "samples_per_second", "steps_per_second"})


class StageProgress(ProgressCallback):
    """transformers' progress bar with the name of what is trained, and logs as a person reads them."""

    training_bar: Any  # None before and after training, and in all processes but the first

    def __init__(self, stage: str) -> None:
        super().__init__()
        self.stage = stage

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.stage)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs is not None:
            self.training_bar.write(f"{self.stage}, {log_line(logs)}")


def log_line(logs: dict[str, Any]) -> str:
    """`epoch 2: loss 1.18 (task 1.10, soft targets 0.08)`, `epoch 2: evaluation accuracy 0.49, f1 0.42`, or how long
    the training took.
    """
    if "train_runtime" in logs:
        return f"{logs['train_runtime']:.0f} s, {logs['train_samples_per_second']:.0f} samples a second"
    if "loss" in logs:
        parts = _figures(logs, "loss_")
        text = f"loss {logs['loss']:.4g}" + (f" ({parts})" if parts else "")
    else:
        text = f"evaluation {_figures(logs, 'eval_', TIMES)}"
    return f"epoch {logs.get('epoch', 0):.3g}: {text}"


def _figures(logs: dict[str, Any], prefix: str, without: frozenset[str] = frozenset()) -> str:
    """The numbers whose names begin with `prefix`."""
    chosen = {name.removeprefix(prefix): value for name, value in logs.items() if name.startswith(prefix)}
    return ", ".join(
        f"{name.replace('_', ' ')} {value:.4g}"
        for name, value in chosen.items()
        if name not in without and isinstance(value, int | float)
    )
