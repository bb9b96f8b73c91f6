"""What is refused of the flags that training inherits from transformers' TrainingArguments.

A flag that cannot have an effect here is refused, rather than ignored; so are the settings of optimizer and schedule
that would only fail, or be ignored, when training begins.
"""

import inspect
import math
from difflib import get_close_matches
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations

from kd.common.utils.devices import resolve_precision
from kd.common.utils.ranges import MOST, Range

_COUNT, _SEED, _BELOW_1 = Range(1, MOST), Range(0, 2**32 - 1), Range(0, 1, below=True)
_POSITIVE, _NOT_NEGATIVE = Range(0, above=True), Range(0)
RANGES = {
    "per_device_train_batch_size": _COUNT,
    "per_device_eval_batch_size": _COUNT,
    "num_train_epochs": _POSITIVE,
    "max_steps": Range(1, MOST, or_else=-1),
    "learning_rate": _POSITIVE,
    "warmup_steps": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
    "adam_beta1": _BELOW_1,
    "adam_beta2": _BELOW_1,
    "adam_epsilon": _NOT_NEGATIVE,
    "gradient_accumulation_steps": _COUNT,
    "max_grad_norm": _NOT_NEGATIVE,
    "label_smoothing_factor": _BELOW_1,
    "torch_empty_cache_steps": _COUNT,
    "logging_steps": _POSITIVE,
    "eval_steps": _POSITIVE,
    "eval_delay": _NOT_NEGATIVE,
    "eval_accumulation_steps": _COUNT,
    "save_steps": _POSITIVE,
    "save_total_limit": _COUNT,
    "seed": _SEED,
    "data_seed": _SEED,
    "dataloader_num_workers": Range(0, 4096),
    "dataloader_prefetch_factor": _COUNT,
    "ddp_bucket_cap_mb": _COUNT,
    "ddp_timeout": _COUNT,
    "local_rank": Range(-1, MOST),
    "neftune_noise_alpha": _NOT_NEGATIVE,
}
_UPLOAD = "a run stays here; upload its student's folder when it is finished"
_SCRIPT = "what is trained and evaluated is the script's choice"
_METRICS = "evaluation always computes the metrics of the report, from logits and labels"
_PRECISION = "--precision decides"
# Flags that have no effect here, and why. Any other value than the default is refused.
UNSUPPORTED = {
    "do_train": _SCRIPT,
    "do_eval": _SCRIPT,
    "do_predict": _SCRIPT,
    "push_to_hub": _UPLOAD,
    "hub_model_id": _UPLOAD,
    "hub_token": _UPLOAD,
    "hub_private_repo": _UPLOAD,
    "hub_strategy": _UPLOAD,
    "hub_always_push": _UPLOAD,
    "hub_revision": _UPLOAD,
    "remove_unused_columns": "the columns that models and objective need are kept",
    "label_names": "labels are called `labels`",
    "length_column_name": "lengths are called `length`",
    "logging_nan_inf_filter": "a loss that is not finite stops the run",
    "prediction_loss_only": _METRICS,
    "eval_do_concat_batches": _METRICS,
    "eval_use_gather_object": _METRICS,
    "batch_eval_metrics": _METRICS,
    "include_for_metrics": _METRICS,
    "fp16": _PRECISION,
    "fp16_full_eval": _PRECISION,
    "bf16_full_eval": _PRECISION,
    "neftune_noise_alpha": "noise on embeddings is not supported",
    "use_liger_kernel": "its losses are not those of the objective",
    "liger_kernel_config": "liger kernels are not supported",
    "optim_target_modules": "the optimizers that read it are not supported",
    "deepspeed": "it is not supported; --fsdp is",
    "save_only_model": "a run could not be continued from such a checkpoint",
}
OPTIMIZER_RANGES = {"momentum": _BELOW_1, "dampening": Range(0, 1), "alpha": _BELOW_1}


def resolve_device(args: TrainingArguments) -> None:
    """Sets --use_cpu and, where it is auto, --precision by the hardware."""
    args.use_cpu = args.use_cpu or not torch.cuda.is_available()
    device = torch.device("cpu" if args.use_cpu else "cuda")
    args.precision = resolve_precision(args.precision, device)  # type: ignore[attr-defined]


def check_supported(args: TrainingArguments) -> None:
    """Raises ValueError for the first flag with a value that could have no effect."""
    for name, reason in UNSUPPORTED.items():
        value, default = getattr(args, name), _default(type(args), name)
        if value != default:
            raise ValueError(f"--{name} has no effect, because {reason}: leave it out")
    if args.bf16 and args.precision != "bf16":  # type: ignore[attr-defined]
        raise ValueError("--bf16 has no effect, because --precision decides: pass --precision bf16")
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
        raise ValueError("--data_seed has no effect where --train_sampling_strategy is group_by_length: leave it out")


def _named(choice: Any) -> str:
    return str(choice.value)


def _default(kind: type, name: str) -> Any:
    field = kind.__dataclass_fields__[name]  # type: ignore[attr-defined]
    return field.default_factory() if callable(field.default_factory) else field.default


def check_report_to(args: TrainingArguments) -> None:
    """Raises ValueError where a tracker is named that is unknown or not installed."""
    installed = get_available_reporting_integrations()
    for name in args.report_to or []:
        if name not in installed:
            raise ValueError(
                f"--report_to {name} is not installed or not known: choose none or some of {', '.join(installed)}"
            )
    if args.run_name and set(args.report_to or []) <= {"tensorboard"}:
        raise ValueError("--run_name has no effect, because TensorBoard's runs are called after stages: leave it out")


def check_optimizer(args: TrainingArguments) -> None:
    """Raises ValueError where the optimizer, its --optim_args or the learning rate's schedule cannot be made."""
    values = _optim_args(args.optim_args)
    plain = _made(args, None)[1]
    kind, keywords = _made(args, args.optim_args)
    for name, value in values.items():
        _check_optim_arg(args, kind, plain, name, value)
    parameter = torch.nn.Parameter(torch.zeros(1))
    if not (inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)):
        return  # a factory that needs the model
    try:
        optimizer = kind([parameter], **keywords)
    except (ValueError, TypeError) as error:
        raise ValueError(f"--optim {_named(args.optim)} with --optim_args {args.optim_args}: {error}") from error
    try:
        settings = args.lr_scheduler_kwargs or {}
        get_scheduler(args.lr_scheduler_type, optimizer, 1, 10, scheduler_specific_kwargs=dict(settings))  # type: ignore[arg-type]
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--lr_scheduler_type {_named(args.lr_scheduler_type)} with --lr_scheduler_kwargs "
            f"{args.lr_scheduler_kwargs}: {error}"
        ) from error


def _optim_args(words: str | None) -> dict[str, str]:
    pairs = [word.split("=") for word in (words or "").replace(" ", "").split(",") if word]
    if any(len(pair) != 2 for pair in pairs) or len({pair[0] for pair in pairs}) < len(pairs):
        raise ValueError(f"--optim_args must be name=value,name=value,..., each name once, got {words}")
    return {name: value for name, value in pairs}


def _made(args: TrainingArguments, optim_args: str | None) -> tuple[Any, dict[str, Any]]:
    """The optimizer's class and keywords, as the Trainer makes them."""
    before, args.optim_args = args.optim_args, optim_args
    try:
        return Trainer.get_optimizer_cls_and_kwargs(args)
    except (ValueError, KeyError, AttributeError, ImportError) as error:
        setting = f"--optim {_named(args.optim)}" + (f" with --optim_args {optim_args}" if optim_args else "")
        raise ValueError(f"{setting} cannot be made: {error}") from error
    finally:
        args.optim_args = before


def _check_optim_arg(args: TrainingArguments, kind: Any, plain: dict[str, Any], name: str, value: str) -> None:
    if name == "weight_decay":
        raise ValueError("--optim_args weight_decay has no effect: pass --weight_decay")
    if _made(args, f"{name}={value}")[1] == plain:  # the Trainer does not read it
        known = [other for other in inspect.signature(kind).parameters if other not in ("params", "lr")]
        near = get_close_matches(name, known, n=1, cutoff=0.8)
        raise ValueError(
            f"--optim_args {name} is not read by --optim {_named(args.optim)}"
            + (f"; did you mean {near[0]}?" if near and near[0] != name else ": leave it out")
        )
    if name in ("nesterov", "centered") and value.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise ValueError(f"--optim_args {name} must be true or false, got {value}")
    found = _made(args, f"{name}={value}")[1].get(name)
    limits = OPTIMIZER_RANGES.get(name)
    if isinstance(found, float) and (not math.isfinite(found) or (limits is not None and found not in limits)):
        raise ValueError(f"--optim_args {name} must be {limits or 'a finite number'}, got {value}")
