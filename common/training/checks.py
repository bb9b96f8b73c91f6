"""Checks of the flags that training inherits from transformers' TrainingArguments.

A flag without effect is not ignored but an error. Invalid arguments of the optimizer and the learning rate schedule
are errors before training starts.
"""

import inspect
import math
from difflib import get_close_matches
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations

from kd.common.utils.devices import accelerator_type, resolve_precision
from kd.common.utils.ranges import MOST, Range

_BELOW_1 = Range(0, 1, below=True)
_FLAGS_BY_RANGE = {
    Range(1, MOST): "gradient_accumulation_steps torch_empty_cache_steps eval_accumulation_steps "
    "dataloader_prefetch_factor ddp_bucket_cap_mb ddp_timeout",
    Range(0, above=True): "logging_steps eval_steps save_steps",
    Range(0): "adam_epsilon max_grad_norm eval_delay neftune_noise_alpha",
    _BELOW_1: "adam_beta1 adam_beta2",
    Range(0, 2**32 - 1): "data_seed",
    Range(0, 4096): "dataloader_num_workers",
    Range(-1, MOST): "local_rank",
}
RANGES = {flag: limits for limits, flags in _FLAGS_BY_RANGE.items() for flag in flags.split()}
# Flags that have no effect, grouped by the reason. Only their default value is accepted.
_UNSUPPORTED_BY_REASON = {
    "the script always trains and evaluates": "do_train do_eval do_predict",
    "a run is stored locally; upload the folder of its student afterwards": "push_to_hub hub_model_id hub_token "
    "hub_private_repo hub_strategy hub_always_push hub_revision",
    "the columns that models and objective need are kept": "remove_unused_columns",
    "lengths are called `length`": "length_column_name",
    "a loss that is not finite stops the run": "logging_nan_inf_filter",
    "evaluation always computes the metrics of the report, from logits and labels": "prediction_loss_only "
    "eval_do_concat_batches eval_use_gather_object batch_eval_metrics include_for_metrics",
    "--precision replaces it": "fp16 fp16_full_eval bf16_full_eval",
    "noise on embeddings is not supported": "neftune_noise_alpha",
    "liger kernels are not supported": "use_liger_kernel liger_kernel_config",
    "the optimizers that read it are not supported": "optim_target_modules",
    "only --fsdp is supported": "deepspeed",
    "a run could not be continued from such a checkpoint": "save_only_model",
}
UNSUPPORTED = {flag: reason for reason, flags in _UNSUPPORTED_BY_REASON.items() for flag in flags.split()}
OPTIMIZER_RANGES = {"momentum": _BELOW_1, "dampening": Range(0, 1), "alpha": _BELOW_1}


def resolve_device(args: TrainingArguments) -> None:
    """Sets --use_cpu, and --precision if it is auto, according to the hardware."""
    device = torch.device("cpu" if args.use_cpu else accelerator_type())
    args.use_cpu = device.type == "cpu"
    args.precision = resolve_precision(args.precision, device)  # type: ignore[attr-defined]


def check_supported(args: TrainingArguments) -> None:
    """Raises ValueError for the first flag that has no effect."""
    for name, reason in UNSUPPORTED.items():
        field = type(args).__dataclass_fields__[name]
        default = field.default_factory() if callable(field.default_factory) else field.default
        if getattr(args, name) != default:
            raise ValueError(f"--{name} has no effect, because {reason}: leave it out")
    if args.bf16 and args.precision != "bf16":  # type: ignore[attr-defined]
        raise ValueError("--bf16 has no effect, because --precision replaces it: pass --precision bf16")
    kept_by_metric = args.load_best_model_at_end or args.save_strategy == "best"
    if not kept_by_metric and args.lr_scheduler_type not in ("reduce_lr_on_plateau", "greedy"):
        for name in ("metric_for_best_model", "greater_is_better"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name} has no effect without --load_best_model_at_end: pass that too")
    if args.dataloader_num_workers == 0:
        for name in ("dataloader_persistent_workers", "dataloader_multiprocessing_context"):
            if getattr(args, name):
                raise ValueError(f"--{name} has no effect without workers: pass --dataloader_num_workers too")
    if args.data_seed is not None and args.train_sampling_strategy == "group_by_length":
        raise ValueError("--data_seed has no effect if --train_sampling_strategy is group_by_length: leave it out")


def check_report_to(args: TrainingArguments) -> None:
    """Raises ValueError for a tracker that is unknown or not installed."""
    installed = get_available_reporting_integrations()
    for name in args.report_to or []:
        if name not in installed:
            raise ValueError(
                f"--report_to {name} is unknown or not installed: choose none, or from {', '.join(installed)}"
            )
    if args.run_name and set(args.report_to or []) <= {"tensorboard"}:
        raise ValueError("--run_name has no effect, because TensorBoard's runs are named after stages: leave it out")


def check_optimizer(args: TrainingArguments) -> None:
    """Raises ValueError if the optimizer, with its --optim_args, or the learning rate schedule cannot be created."""
    for name, value in _optim_args(args.optim_args).items():
        _check_optim_arg(args, name, value)
    kind, keywords = _optimizer_class(args, args.optim_args)
    if not (inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)):
        return  # a factory that needs the model
    try:
        optimizer = kind([torch.nn.Parameter(torch.zeros(1))], **keywords)
    except (ValueError, TypeError) as error:
        raise ValueError(f"--optim {_name(args.optim)} with --optim_args {args.optim_args}: {error}") from error
    try:
        kwargs = args.lr_scheduler_kwargs or {}
        get_scheduler(args.lr_scheduler_type, optimizer, 1, 10, scheduler_specific_kwargs=dict(kwargs))  # type: ignore[arg-type]
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--lr_scheduler_type {_name(args.lr_scheduler_type)} with --lr_scheduler_kwargs "
            f"{args.lr_scheduler_kwargs}: {error}"
        ) from error


def check_dot(args: TrainingArguments) -> None:
    """Raises ValueError if --dot_delta is set, and other flags do not allow separate gradients and momentums."""
    delta: float | None = args.dot_delta  # type: ignore[attr-defined]
    if delta is None:
        return
    kind, keywords = _optimizer_class(args, args.optim_args)
    momentum = keywords.get("momentum", 0.0)
    if kind is not torch.optim.SGD or not momentum or keywords.get("dampening"):
        raise ValueError("--dot_delta needs --optim sgd with --optim_args momentum=0.9 and without dampening")
    if delta > momentum or momentum + delta >= 1:
        raise ValueError(
            f"--dot_delta must be at most {momentum:g} and below {1 - momentum:g}, because momentum is {momentum:g}, "
            f"got {delta:g}"
        )
    unsupported = {
        "--max_grad_norm": (args.max_grad_norm, "pass --max_grad_norm 0"),
        "--precision fp16": (args.fp16, "pass --precision fp32 or bf16"),
        "a run of several processes": (args.world_size > 1 or args.fsdp, "start one process"),
    }
    for name, (is_set, remedy) in unsupported.items():
        if is_set:
            raise ValueError(f"--dot_delta separates two gradients, which {name} does not support: {remedy}")


def _name(choice: Any) -> str:
    return str(choice.value)


def _optim_args(words: str | None) -> dict[str, str]:
    pairs = [word.split("=") for word in (words or "").replace(" ", "").split(",") if word]
    if any(len(pair) != 2 for pair in pairs) or len({pair[0] for pair in pairs}) < len(pairs):
        raise ValueError(f"--optim_args must be name=value,name=value,..., each name once, got {words}")
    return {name: value for name, value in pairs}


def _optimizer_class(args: TrainingArguments, optim_args: str | None) -> tuple[Any, dict[str, Any]]:
    """The optimizer's class and keyword arguments, as the Trainer chooses them."""
    before, args.optim_args = args.optim_args, optim_args
    try:
        return Trainer.get_optimizer_cls_and_kwargs(args)
    except (ValueError, KeyError, AttributeError, ImportError) as error:
        setting = f"--optim {_name(args.optim)}" + (f" with --optim_args {optim_args}" if optim_args else "")
        raise ValueError(f"{setting} cannot be created: {error}") from error
    finally:
        args.optim_args = before


def _check_optim_arg(args: TrainingArguments, name: str, value: str) -> None:
    if name == "weight_decay":
        raise ValueError("--optim_args weight_decay has no effect: pass --weight_decay")
    kind, keywords = _optimizer_class(args, f"{name}={value}")
    if keywords == _optimizer_class(args, None)[1]:  # the Trainer does not read it
        known = [other for other in inspect.signature(kind).parameters if other not in ("params", "lr")]
        near = get_close_matches(name, known, n=1, cutoff=0.8)
        raise ValueError(
            f"--optim_args {name} is not read by --optim {_name(args.optim)}"
            + (f"; did you mean {near[0]}?" if near and near[0] != name else ": leave it out")
        )
    if name in ("nesterov", "centered") and value.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise ValueError(f"--optim_args {name} must be true or false, got {value}")
    number, limits = keywords.get(name), OPTIMIZER_RANGES.get(name)
    if isinstance(number, float) and (not math.isfinite(number) or (limits is not None and number not in limits)):
        raise ValueError(f"--optim_args {name} must be {limits or 'a finite number'}, got {value}")
