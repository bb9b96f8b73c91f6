"""KDTrainer: transformers' Trainer with an objective and a frozen teacher.

It adds to its parent:

- The loss is an `Objective` over named outputs, whose terms are logged.
- The teacher is frozen and in eval mode, and not part of optimizer and checkpoints. Cached outputs can replace it.
- The gradient of a step is that of its samples as one batch, for any number of accumulation steps and processes.
- A non-finite loss or weight stops the run, or excludes one of several students.
- Training resumes only from complete checkpoints (`CheckpointTrainer`).
"""

import math
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel, TrainerState
from transformers.trainer_utils import TrainOutput, has_length

from kd.common.objective import Objective
from kd.common.outputs import FeatureHooks, Outputs, call_with_hooks
from kd.common.training.arguments import KDTrainingArguments
from kd.common.training.batch_norm import (
    TOO_SMALL,
    checking_last_batch,
    release_batch_norms,
    synchronize_batch_norms,
)
from kd.common.training.checkpoint_trainer import CheckpointTrainer
from kd.common.training.checkpoints import last_checkpoint, without_sharing
from kd.common.training.inference import LengthGroupedSampler, column_array
from kd.common.training.optimizers import DistillationOrientedSGD, milestone_schedule, parameter_groups
from kd.common.training.side_by_side import SideBySideObjective
from kd.common.utils.errors import UserError, recording_interrupts
from kd.common.utils.finite import CHECK_EVERY, DivergenceMonitor

if TYPE_CHECKING:
    from kd.common.training.teacher_outputs import TeacherOutputs, TeacherViews

OBJECTIVE_FILE = "objective.safetensors"
ReplaceBatch = Callable[[Any, dict[str, Any], TrainerState, int], dict[str, Any]]


class KDTrainer(CheckpointTrainer):
    """Trains `model` to minimize `objective`, with a live teacher, with cached teacher outputs, or without a teacher.

    Args:
        objective: The loss. Its parameters (auxiliary parameters) are optimized, clipped and checkpointed with those
            of the student, and are not saved with the student.
        teacher: A model that runs under no_grad on the same inputs.
        teacher_outputs: Cached outputs of a teacher for the training samples. Batches need `sample_id`.
        teacher_views: A table of the logits of `teacher` for each view. Batches need `sample_id` and `view`.
        features, teacher_features: {name: path of a submodule} whose outputs become named features of either model.
        not_for_student: Inputs that only the teacher takes.
        replace_batch: (student, batch, state, number) -> batch, called before the forward passes of micro-batch
            `number` of an update. A batch that the student sampled has the entry `sampled`, and no cached outputs.
    """

    loss_is_scaled_for_ga = True  # compute_loss scales each micro-batch by its share of the step's samples
    args: KDTrainingArguments
    model: nn.Module
    objective: Objective | SideBySideObjective

    def __init__(
        self,
        *args: Any,
        objective: Objective | SideBySideObjective,
        teacher: nn.Module | None = None,
        teacher_outputs: "TeacherOutputs | None" = None,
        teacher_views: "TeacherViews | None" = None,
        features: dict[str, str] | None = None,
        teacher_features: dict[str, str] | None = None,
        not_for_student: Sequence[str] = (),
        replace_batch: ReplaceBatch | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.objective = objective.to(self.args.device)
        self.objective_in_step: nn.Module = objective
        has_auxiliary = any(p.requires_grad for p in objective.parameters())
        reads_student = any(getattr(module, "reads_student", False) for module in objective.modules())
        if self.is_fsdp_enabled and (has_auxiliary or reads_student):
            raise UserError(
                "--fsdp supports no method that has auxiliary parameters or reads the student's weights: leave it out"
            )
        if has_auxiliary:
            self.objective_in_step = self.accelerator.prepare_model(objective)  # averages gradients over processes
        self.teacher: nn.Module | None = None
        self._teacher_hooks = FeatureHooks(teacher, teacher_features or {}) if teacher is not None else None
        if teacher is not None:
            teacher.eval().requires_grad_(False)
            self.teacher = self.accelerator.prepare_model(teacher, evaluation_mode=True)
        self.teacher_outputs, self.teacher_views = teacher_outputs, teacher_views
        self.not_for_student, self.replace_batch = frozenset(not_for_student), replace_batch
        self._hooks = FeatureHooks(self.model, features or {})
        self._parts: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.args.device))
        self._part_weights: dict[str, Any] = defaultdict(float)  # not all batches have the same parts
        self._divergence = DivergenceMonitor(
            list(objective.objectives) if isinstance(objective, SideBySideObjective) else ()
        )
        self._interrupted, self._first_step, self._step_of_gradients = threading.Event(), -1, -1
        if self.args.world_size > 1:
            synchronize_batch_norms(self.model, objective)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        with recording_interrupts() as self._interrupted:
            return super().train(resume_from_checkpoint, *args, **kwargs)

    # ---- one step ----

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if self._interrupted.is_set():
            raise KeyboardInterrupt
        if self._step_of_gradients < 0:
            self._first_step = self.state.global_step
        is_first = self.state.global_step == self._first_step
        if self.state.global_step != self._step_of_gradients:  # the parent clears the gradients of the model alone
            self.objective.zero_grad()
            self._step_of_gradients = self.state.global_step
        try:
            with self._checking_last_batch() if is_first else nullcontext():
                return super().training_step(*args, **kwargs)
        except ValueError as error:
            if "more than 1 value per channel" in str(error):  # from torch's batch norm
                raise UserError(TOO_SMALL) from None
            raise

    def _checking_last_batch(self) -> AbstractContextManager[None]:
        """If the last batch of an epoch will have one sample, raises UserError in the first step for a batch norm that
        cannot train on it. With several processes, accelerate fills up the last batches.
        """
        if self.args.world_size > 1 or self.args.dataloader_drop_last or not has_length(self.train_dataset):
            return nullcontext()
        samples, batches = len(self.train_dataset), self.state.max_steps * self.args.gradient_accumulation_steps
        return checking_last_batch(samples, self._train_batch_size, batches, self.model, self.objective)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of one micro-batch."""
        labels, sample_ids, views = (inputs.pop(name, None) for name in ("labels", "sample_id", "view"))
        sampled = inputs.pop("sampled", None)
        # The mean over the step's items is the loss of one big batch; data parallelism averages over processes.
        share = 1.0
        if num_items_in_batch is not None:
            share = self.objective.items(inputs, labels) * self.args.world_size / num_items_in_batch
        student = call_with_hooks(model, self._hooks, inputs, self.not_for_student)
        student.sample_id, student.sampled = sample_ids, sampled
        teacher = self._teacher_forward(inputs, sample_ids, views)
        self.objective.set_progress(self.state.global_step / max(self.state.max_steps, 1))
        parts = self.objective_in_step(student, teacher, labels)
        loss, parts = self._divergence.drop_diverged(self.state.global_step + 1, parts)
        loss = loss * share if self._dot is None else self._dot.separated(parts, share)
        if self.args.device.type == "cpu" or self.state.global_step % CHECK_EVERY == 0:
            self._check_finite()
        logged = {f"loss_{name}": part.detach() for name, part in parts.items()}
        logged |= self.objective.watch(student, teacher, labels)
        for name, value in logged.items():
            self._parts[name] += value * share
            self._part_weights[name] += share  # one per optimizer step
        return (loss, {"logits": student.logits}) if return_outputs else loss

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> Any:
        """The micro-batches of an update, each after `replace_batch`, and the number of their items."""
        if self.replace_batch is not None:
            replace, batches = self.replace_batch, enumerate(epoch_iterator)
            epoch_iterator = (replace(self.model, batch, self.state, number) for number, batch in batches)
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | int | None:
        """Number of items in this optimizer step over all micro-batches and processes. None if the step is one
        micro-batch.
        """
        if self.args.world_size == 1 and len(batch_samples) == 1:
            return None
        number = sum(self.objective.items(batch, batch.get("labels")) for batch in batch_samples)
        if self.args.world_size == 1:
            return number  # stays on the host: a copy to a GPU would wait for it
        return self.accelerator.gather(torch.tensor(number, device=device)).sum()

    @torch.no_grad()
    def _teacher_forward(
        self, inputs: dict[str, Any], sample_ids: Tensor | None, views: Tensor | None
    ) -> Outputs | None:
        if self.teacher_outputs is not None:
            if sample_ids is None:
                raise ValueError("cached teacher outputs need a `sample_id` column in the training data")
            mask = inputs.get("attention_mask")
            return self.teacher_outputs.batch(sample_ids, None if mask is None else mask.shape[1], self.args.device)
        if self.teacher is None or self._teacher_hooks is None:
            return None
        if self.teacher_views is None:
            return call_with_hooks(self.teacher, self._teacher_hooks, inputs)
        if sample_ids is None or views is None:
            raise ValueError("a table of teacher views needs `sample_id` and `view` in the training data")
        return self.teacher_views.batch(sample_ids, views, lambda rows: self._teacher_logits(inputs, rows))

    def _teacher_logits(self, inputs: dict[str, Tensor], rows: Tensor) -> Tensor:
        assert self.teacher is not None and self._teacher_hooks is not None
        batch = {name: value[rows] for name, value in inputs.items()}
        logits = call_with_hooks(self.teacher, self._teacher_hooks, batch).logits
        assert logits is not None
        return logits

    def _check_finite(self, weights: bool = False) -> None:
        """Stops the training if the recorded losses, or the weights, of all students are not finite."""
        any_left = self._divergence.check_losses(lambda: last_checkpoint(str(self.args.output_dir)))
        if any_left and weights:
            any_left = self._divergence.check_weights(self.state.global_step, self._modules_by_student())
        if not any_left and self.args.world_size == 1:  # several processes would not detect it at the same step
            self.control.should_training_stop = True

    def _modules_by_student(self) -> dict[str, tuple[nn.Module, ...]]:
        if not isinstance(self.objective, SideBySideObjective):
            return {"": (self.model, self.objective)}
        students: nn.ModuleDict = self.model.students  # type: ignore[assignment]
        return {name: (students[name], objective) for name, objective in self.objective.objectives.items()}

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        uses_weights = self.control.should_evaluate or self.control.should_save
        if self.control.should_log or uses_weights:
            self._check_finite(weights=uses_weights)  # diverged weights are neither evaluated nor saved
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        self._check_finite(weights=True)
        return super()._finalize_training(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._parts:
            weights = [torch.as_tensor(self._part_weights[name], device=self.args.device) for name in self._parts]
            totals = torch.stack([torch.stack(list(self._parts.values())), torch.stack(weights)])
            if self.args.world_size > 1:
                totals = self.accelerator.reduce(totals, "mean")
            means = dict(zip(self._parts, (totals[0] / totals[1]).tolist(), strict=True))
            logs |= {name: mean for name, mean in means.items() if math.isfinite(mean)}  # no diverged students
            self._parts.clear()
            self._part_weights.clear()
        super().log(logs, start_time)

    # ---- evaluation ----

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Returns logits and labels but no loss, which would need teacher outputs for the evaluation data."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels", None)
        for name in ("sample_id", "view"):
            inputs.pop(name, None)
        with torch.no_grad():
            logits = call_with_hooks(model, self._hooks, inputs, self.not_for_student).logits
        return None, None if logits is None else logits.detach().float(), labels

    # ---- optimizer ----

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, dict[str, Any]]:
        """The parent's choice; SGD in one pass over the weights (on a CPU, torch would take several), or DOT."""
        kind, keywords = CheckpointTrainer.get_optimizer_cls_and_kwargs(args, model)
        if kind is not torch.optim.SGD:
            return kind, keywords
        if args.dot_delta is not None:
            kind, keywords = DistillationOrientedSGD, keywords | {"delta": args.dot_delta}
        return kind, keywords | {"fused": True}

    @property
    def _dot(self) -> DistillationOrientedSGD | None:
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
        return optimizer if isinstance(optimizer, DistillationOrientedSGD) else None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The parent's optimizer, with the parameter groups of submodules and the auxiliary parameters added."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(model)
        for name, parameters in parameter_groups(self.model).items():
            rate = getattr(self.args, f"{name}_learning_rate")
            if rate is not None:
                chosen = {id(p) for p in parameters}
                for group in optimizer.param_groups:
                    group["params"] = [p for p in group["params"] if id(p) not in chosen]
                optimizer.add_param_group({"params": parameters, "lr": rate, "weight_decay": 0.0})
        extra = [p for p in self.objective.parameters() if p.requires_grad]
        if extra:
            decay = self.args.weight_decay if self.args.decay_norm_and_bias else 0.0
            optimizer.add_param_group({"params": extra, "weight_decay": decay})
        return optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices and convolutions; biases and norms of any kind only with --decay_norm_and_bias."""
        if self.args.decay_norm_and_bias:
            return [name for name, _ in model.named_parameters()]
        matrices = {name for name, parameter in model.named_parameters() if parameter.dim() > 1}
        return [name for name in super().get_decay_parameter_names(model) if name in matrices]

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The parent's schedule, or a tenth of the learning rate after each of `lr_milestones` (in epochs)."""
        if self.args.lr_milestones is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        optimizer, epochs = optimizer or self.optimizer, self.args.lr_milestones
        assert optimizer is not None, "create the optimizer before its schedule"
        self.lr_scheduler = milestone_schedule(optimizer, epochs, num_training_steps / self.args.num_train_epochs)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _clip_grad_norm(self, model: nn.Module) -> Tensor | None:
        extra = list(self.objective.parameters())
        if not extra:
            return super()._clip_grad_norm(model)
        return self.accelerator.clip_grad_norm_([*model.parameters(), *extra], self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Skipped when several students train side by side: one gradient norm over all of them is meaningless, and in
        the parent's computation one diverged student would make the gradients of all students NaN. Skipped with DOT
        too, where the gradient is in two parts.
        """
        if isinstance(self.objective, SideBySideObjective) or self._dot is not None:
            return grad_norm
        return super()._get_grad_norm(model, grad_norm)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthGroupedSampler(column_array(dataset, self.args.length_column_name), step, self.args.seed)

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler | None:
        """The parent reads the length of each sample by itself, which takes longer than a small model."""
        columns, name = getattr(eval_dataset, "column_names", ()), self.args.length_column_name
        if self.args.train_sampling_strategy != "group_by_length" or name not in columns:
            return super()._get_eval_sampler(eval_dataset)
        return LengthGroupedSampler(column_array(eval_dataset, name), self.args.eval_batch_size, self.args.seed)

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Applies `dataloader_drop_last` to training batches only: evaluation covers all samples."""
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drop_last and kwargs.get("is_training", False)
        try:
            return super()._get_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last

    def _run_epoch(self, model: nn.Module, epoch: int, *args: Any, **kwargs: Any) -> Any:
        if hasattr(self.train_dataset, "set_epoch"):  # accelerate omits it with several processes and after resuming
            self.train_dataset.set_epoch(epoch)  # type: ignore[union-attr]
        return super()._run_epoch(model, epoch, *args, **kwargs)

    # ---- checkpoints ----

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        weights = self.model.state_dict() if state_dict is None else state_dict
        # safetensors cannot save channels_last weights, or weights that share memory.
        weights = {name: weight.contiguous() for name, weight in weights.items()}
        if not isinstance(self.model, PreTrainedModel):  # its save_pretrained saves tied weights once
            weights = without_sharing(weights)
        super()._save(output_dir, weights)
        state = self.objective.state_dict()
        if state and self.args.should_save:
            save_file(state, str(Path(output_dir or str(self.args.output_dir)) / OBJECTIVE_FILE))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if (path := Path(resume_from_checkpoint, OBJECTIVE_FILE)).exists():
            self.objective.load_state_dict(load_file(str(path)))

    def finish(self) -> None:
        """Removes hooks, autocast and data parallelism from the model and the teacher."""
        release_batch_norms(self.model, self.objective)
        self._hooks.remove()
        if self._teacher_hooks is not None:
            self._teacher_hooks.remove()
        for model in [m for m in (self.model_wrapped, self.teacher) if m is not None]:  # no bool() if compiled
            unwrapped = self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
            # accelerate leaves these; with the first, the next trainer would not autocast the model or its copies.
            for leftover in ("_is_accelerate_prepared", "forward"):
                vars(unwrapped).pop(leftover, None)
        self.accelerator.free_memory()
