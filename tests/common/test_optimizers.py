"""The distillation-oriented SGD: its steps by hand, in KDTrainer, and what it refuses."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from kd.common.losses import feature_l2
from kd.common.objective import FeatureTerm, Objective, task_loss
from kd.common.training.arguments import KDTrainingArguments
from kd.common.training.optimizers import DistillationOrientedSGD
from kd.common.training.side_by_side import SideBySide, SideBySideObjective
from kd.common.training.trainer import KDTrainer
from kd_testing.tiny import Rows, TinyClassifier, arguments, kd, model

MOMENTUM, DELTA, DECAY, RATE = 0.6, 0.3, 0.1, 0.5


@dataclass
class Arguments(KDTrainingArguments):
    """Those of the scripts that have the flag."""

    dot_delta: float | None = None


def weights(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def by_hand(gradients, momentum, nesterov):
    """The updates that fixed gradients contribute, one for each step."""
    updates, buffer = [], np.zeros(2)
    for gradient in gradients:
        buffer = momentum * buffer + gradient
        updates.append(RATE * (gradient + momentum * buffer if nesterov else buffer))
    return updates


@pytest.mark.parametrize("nesterov", [False, True])
def test_two_gradients_have_two_momentums(nesterov):
    """Three parameters with linear losses, whose gradients are constants: of both losses, of one, and of the other."""
    labels, teacher = np.array([[1.0, -2.0], [0.5, 1.0], [3.0, 0.0]]), np.array([[0.2, 1.0], [-1.0, 4.0], [0.0, 2.0]])
    both, only_labels, only_teacher = (nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(3))
    optimizer = DistillationOrientedSGD(
        [both, only_labels, only_teacher], DELTA, lr=RATE, momentum=MOMENTUM, nesterov=nesterov
    )
    for of_labels, of_teacher in zip(torch.tensor(labels), torch.tensor(teacher), strict=True):
        parts = {
            "task": of_labels @ (both + only_labels),
            "soft_targets": 0.25 * of_teacher @ (both + only_teacher),
            "hint": 0.75 * of_teacher @ (both + only_teacher),
        }
        loss = optimizer.separated(parts)
        assert loss.item() == pytest.approx(sum(parts.values()).item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = {
        both: [
            *by_hand(labels, MOMENTUM - DELTA, nesterov),
            *by_hand(teacher, MOMENTUM + DELTA, nesterov),
        ],
        only_labels: by_hand(labels, MOMENTUM, nesterov),
        only_teacher: by_hand(teacher, MOMENTUM, nesterov),
    }
    for parameter, updates in expected.items():
        np.testing.assert_allclose(parameter.detach().numpy(), -sum(updates), rtol=1e-12)


def test_weight_decay_joins_the_gradient_of_the_labels_once():
    """The recursion of the paper, step by step, for one weight."""
    weight = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = DistillationOrientedSGD([weight], DELTA, lr=RATE, momentum=MOMENTUM, weight_decay=DECAY)
    expected, of_labels, of_teacher = 1.0, 0.0, 0.0
    for first, second in ((1.0, 0.5), (-2.0, 0.25), (0.5, 1.0)):
        optimizer.separated({"task": first * weight.sum(), "soft_targets": second * weight.sum()}).backward()
        optimizer.step()
        optimizer.zero_grad()
        of_labels = (MOMENTUM - DELTA) * of_labels + first + DECAY * expected
        of_teacher = (MOMENTUM + DELTA) * of_teacher + second
        expected -= RATE * (of_labels + of_teacher)
        assert weight.item() == pytest.approx(expected, rel=1e-12)


def trained(folder, student: TinyClassifier, objective: Objective | None = None, resume=None, **settings):
    settings = {"optim_args": "momentum=0.6", "max_grad_norm": 0.0, "num_train_epochs": 4} | settings
    KDTrainer(
        model=student, teacher=model(9), objective=objective or kd(), train_dataset=Rows(),
        args=arguments(folder, kind=Arguments, **settings),
    ).train(resume_from_checkpoint=resume)  # fmt: skip
    return weights(student)


@pytest.mark.parametrize("nesterov", ["false", "true"])
def test_without_a_difference_it_is_sgd(tmp_path, nesterov):
    settings = {"optim_args": f"momentum=0.9,nesterov={nesterov}", "weight_decay": 0.1}
    plain = trained(tmp_path / "sgd", model(), **settings)
    torch.testing.assert_close(trained(tmp_path / "dot", model(), dot_delta=0.0, **settings), plain)
    assert not torch.allclose(trained(tmp_path / "other", model(), dot_delta=0.075, **settings), plain, atol=1e-3)


def test_training_on_one_of_the_losses_is_sgd(tmp_path):
    """As a control and a teacher are trained, and SimKD without labels."""
    hint = FeatureTerm("hidden", "hidden", feature_l2)
    for name, terms in {"labels": {"task": (1.0, task_loss())}, "hint": {"hint": (1.0, hint)}}.items():
        plain = trained(tmp_path / name, model(), Objective(**terms))
        assert torch.equal(trained(tmp_path / f"dot_{name}", model(), Objective(**terms), dot_delta=0.3), plain)


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 2), (2, 4), (3, 3)])
def test_accumulated_gradients_are_those_of_one_batch(tmp_path, batch, accumulation):
    """With 3 x 3 over 8 samples of 24, the steps differ: they are compared with one batch of 9."""
    whole = trained(tmp_path / "whole", model(), dot_delta=0.3, per_device_train_batch_size=batch * accumulation)
    split = trained(
        tmp_path / "split", model(), dot_delta=0.3,
        per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    torch.testing.assert_close(split, whole)


def test_both_momentums_are_resumed(tmp_path):
    settings = {"dot_delta": 0.3, "save_strategy": "steps", "save_steps": 4, "save_total_limit": 10}
    whole = trained(tmp_path, model(), **settings)
    resumed = trained(tmp_path, model(3), resume=str(tmp_path / "checkpoint-8"), **settings)
    assert torch.equal(resumed, whole)


def test_students_side_by_side_have_the_momentums_of_training_alone(tmp_path):
    def objectives() -> dict[str, Objective]:
        torch.manual_seed(3)
        hint = FeatureTerm("hidden", "hidden", feature_l2, nn.Linear(8, 8))
        return {
            "control": Objective(task=(1.0, task_loss())),
            "kd": kd(),
            "hint": Objective(task=(1.0, task_loss()), hint=(0.5, hint)),
            "match": Objective(hidden=(1.0, FeatureTerm("hidden", "hidden", feature_l2))),
        }

    students = {name: model(number) for number, name in enumerate(objectives())}
    settings = {"optim_args": "momentum=0.6,nesterov=true", "max_grad_norm": 0.0, "num_train_epochs": 4}
    KDTrainer(
        model=SideBySide(students), teacher=model(9), objective=SideBySideObjective(objectives()),
        train_dataset=Rows(), args=arguments(tmp_path / "together", kind=Arguments, dot_delta=0.3, **settings),
    ).train()  # fmt: skip
    for number, (name, objective) in enumerate(objectives().items()):
        alone = trained(tmp_path / name, model(number), objective, dot_delta=0.3, **settings)
        torch.testing.assert_close(weights(students[name]), alone, msg=name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim": "adamw_torch", "optim_args": None}, "--dot_delta needs --optim sgd"),
        ({"optim_args": None}, "--dot_delta needs --optim sgd with --optim_args momentum=0.9"),
        ({"optim_args": "momentum=0.9,dampening=0.1"}, "without dampening"),
        ({"optim_args": "momentum=0.95"}, "must be at most 0.95 and below 0.05, because momentum is 0.95, got 0.075"),
        ({"optim_args": "momentum=0.05"}, "must be at most 0.05"),
        ({"max_grad_norm": 1.0}, "which --max_grad_norm does not support: pass --max_grad_norm 0"),
    ],
)
def test_settings_that_allow_no_two_momentums_are_errors(settings, message, tmp_path):
    settings = {"optim_args": "momentum=0.9", "max_grad_norm": 0.0} | settings
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, kind=Arguments, dot_delta=0.075, **settings)


def test_a_run_of_several_processes_is_an_error(tmp_path, monkeypatch):
    from transformers import TrainingArguments

    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: 2))
    with pytest.raises(ValueError, match="several processes does not support: start one process"):
        arguments(tmp_path, kind=Arguments, dot_delta=0.075, optim_args="momentum=0.9", max_grad_norm=0.0)
