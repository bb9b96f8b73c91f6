"""The choice of device and precision, with pretended hardware, and loss scaling."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.trainer_utils import set_seed

from kd.common.losses import feature_l2
from kd.common.objective import FeatureTerm, Objective, task_loss
from kd.common.training.checks import resolve_device
from kd.common.training.trainer import KDTrainer
from kd.common.utils import devices
from kd_testing.tiny import Rows, arguments, model

CUDA, MPS, CPU = torch.device("cuda"), torch.device("mps"), torch.device("cpu")


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({"avx512_f": True}, "fp32"), ({}, "fp32")],
)
def test_auto_precision_of_a_cpu(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert devices.resolve_precision("auto", CPU) == expected
    assert devices.resolve_precision("fp32", CPU) == "fp32"
    assert devices.resolve_precision("bf16", CPU) == "bf16"


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((6, 1), "fp32"), ((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")],
)
def test_auto_precision_of_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: str) -> None:
    """P40, V100, T4, A100 and H100."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert devices.resolve_precision("auto", CUDA) == expected
    assert devices.resolve_precision("fp16", CUDA) == "fp16"


def test_auto_precision_of_apples_gpus_is_fp32() -> None:
    assert devices.resolve_precision("auto", MPS) == "fp32"
    assert devices.resolve_precision("fp16", MPS) == "fp16"


@pytest.mark.parametrize(
    ("cuda", "mps", "use_cpu", "expected"),
    [
        (True, False, False, "cuda"),
        (False, True, False, "mps"),
        (False, False, False, "cpu"),
        (False, True, True, "cpu"),
    ],
)
def test_the_device_is_chosen_by_the_hardware(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, use_cpu: bool, expected: str, tmp_path: Path
) -> None:
    args = arguments(tmp_path, use_cpu=True, precision="fp32")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    args.use_cpu, args.precision = use_cpu, "auto"
    resolve_device(args)
    assert args.use_cpu == (expected == "cpu")
    assert args.precision == ("fp16" if expected == "cuda" else "fp32")


def test_fp16_on_a_cpu_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--precision fp16 needs a GPU: pass --precision fp32 or bf16"):
        arguments(tmp_path, precision="fp16")


def test_the_arguments_of_transformers_follow_the_precision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("kd.common.training.checks.resolve_precision", lambda name, device: "fp16")
    args = arguments(tmp_path, precision="auto")
    assert args.fp16 and not args.bf16 and args.mixed_precision == "fp16"


def test_autocast_has_the_type_of_the_precision() -> None:
    layer, x = nn.Linear(2, 2), torch.ones(1, 2)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        with devices.autocast(CPU, precision):
            assert layer(x).dtype == dtype


def test_steps_that_loss_scaling_skips_leave_no_gradients_behind(tmp_path: Path) -> None:
    """The gradient of an auxiliary parameter overflows in the first two steps, which are skipped. The others are the
    steps of a training without loss scaling.
    """

    def train(steps: int, overflows: int = 0, scaler: torch.amp.GradScaler | None = None) -> dict[str, torch.Tensor]:
        set_seed(0)
        projector, left = nn.Linear(8, 8), [overflows]
        objective = Objective(
            task=(1.0, task_loss()), hint=(1.0, FeatureTerm("hidden", "hidden", feature_l2, projector))
        )

        def overflow(gradient: torch.Tensor) -> torch.Tensor:
            left[0] -= 1
            return gradient * torch.inf if left[0] >= 0 else gradient

        projector.weight.register_hook(overflow)
        args = arguments(tmp_path, max_steps=steps, max_grad_norm=0)
        trainer = KDTrainer(
            model=model(1), args=args, objective=objective, teacher=model(2), train_dataset=Rows(8)
        )  # fmt: skip
        trainer.accelerator.scaler = scaler
        trainer.train()
        return {**trainer.model.state_dict(), **objective.state_dict()}

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaled, plain = train(5, overflows=2, scaler=scaler), train(3)
    assert scaler.get_scale() == 2.0**8, "halved twice"
    assert scaled.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(scaled[name], value, rtol=1e-5, atol=1e-7)
