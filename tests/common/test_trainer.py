"""KDTrainer: gradients, the frozen teacher, auxiliary parameters, resuming, and stopping on non-finite losses."""

import copy
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kd.common.losses import feature_l2, soft_target_kl
from kd.common.metrics.quality import classification_metrics
from kd.common.objective import FeatureTerm, Objective, logit_term, task_loss
from kd.common.outputs import Outputs
from kd.common.token_terms import label_term, per_sequence
from kd.common.training.checkpoints import last_checkpoint
from kd.common.training.inference import LengthGroupedSampler
from kd.common.training.teacher_outputs import TeacherOutputs
from kd.common.training.trainer import KDTrainer
from kd.common.utils.errors import UserError
from kd.common.utils.tasks import IGNORED
from kd_testing.paths import REPO
from kd_testing.tiny import Rows, TinyClassifier, arguments, break_second_step, kd, model


def weights(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def trained(folder: Path, student: TinyClassifier, objective: Objective | None = None, teacher=None, n=24, **kwargs):
    resume = kwargs.pop("resume", None)
    outputs = kwargs.pop("teacher_outputs", None)
    teacher = teacher if teacher is not None or outputs is not None else model(9)
    trainer = KDTrainer(
        model=student,
        args=arguments(folder, **kwargs),
        objective=objective or kd(),
        teacher=teacher,
        teacher_outputs=outputs,
        train_dataset=Rows(n),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (4, 2), (2, 4), (3, 3)])
def test_accumulated_gradient_equals_the_gradient_of_one_big_batch(tmp_path, batch, accumulation):
    """The gradient is the change of the weights in one SGD step with learning rate 1. With 3 x 3 over 8 samples, one
    micro-batch is short.
    """
    student, teacher, rows = model(), model(9), Rows(8)
    out = student(rows.x)
    loss = 0.5 * F.cross_entropy(out.logits, rows.labels) + 0.5 * soft_target_kl(out.logits, teacher(rows.x).logits, 2)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(student.parameters()))])
    before = weights(student)
    trained(
        tmp_path, student, teacher=teacher, n=8, per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation, learning_rate=1.0, max_grad_norm=0.0, max_steps=1,
    )  # fmt: skip
    torch.testing.assert_close(before - weights(student), expected)


def test_sgd_in_one_pass_takes_the_steps_of_several(tmp_path):
    """On weights in channels_last, also of 1x1 convolutions, whose memory format is ambiguous."""
    args = arguments(tmp_path, optim="sgd", optim_args="momentum=0.9,nesterov=true", weight_decay=0.1)
    kind, keywords = KDTrainer.get_optimizer_cls_and_kwargs(args)
    assert kind is torch.optim.SGD and keywords["fused"]
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1, bias=False))
    network.to(memory_format=torch.channels_last)
    trained = []
    for fused in (True, False):
        student = copy.deepcopy(network)
        optimizer = kind(student.parameters(), **keywords | {"fused": fused, "lr": 0.5})
        for images in torch.randn(4, 2, 3, 6, 6, generator=torch.Generator().manual_seed(0)):
            student(images.contiguous(memory_format=torch.channels_last)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append(student.state_dict())
    for name, weight in trained[0].items():
        torch.testing.assert_close(weight, trained[1][name], msg=name)


class Sequences(torch.utils.data.Dataset):
    """Eight rows of five positions, with very different numbers of labels."""

    def __init__(self) -> None:
        self.x, self.labels = torch.randn(8, 5, 6), torch.randint(3, (8, 5))
        self.labels[torch.arange(5) >= torch.tensor([1, 1, 1, 1, 5, 5, 5, 4]).unsqueeze(1)] = IGNORED

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"x": self.x[i], "labels": self.labels[i]}


@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (4, 2), (3, 3)])
def test_each_token_has_the_same_weight_in_any_split_into_micro_batches(tmp_path, batch, accumulation):
    student, teacher, rows = model(), model(9), Sequences()
    labelled = rows.labels != IGNORED
    logits, teacher_logits = student(rows.x).logits[labelled], teacher(rows.x).logits[labelled]
    loss = 0.5 * F.cross_entropy(logits, rows.labels[labelled]) + 0.5 * soft_target_kl(logits, teacher_logits, 2.0)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(student.parameters()))])
    before = weights(student)
    soft = logit_term(partial(soft_target_kl, temperature=2.0), ignore_unlabelled=True)
    KDTrainer(
        model=student, teacher=teacher, train_dataset=rows,
        objective=Objective(task=(0.5, task_loss()), soft=(0.5, soft)),
        args=arguments(tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
                       learning_rate=1.0, max_grad_norm=0.0, max_steps=1),
    ).train()  # fmt: skip
    torch.testing.assert_close(before - weights(student), expected)


@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (4, 2), (3, 3)])
def test_each_sequence_has_the_same_weight_in_any_split_into_micro_batches(tmp_path, batch, accumulation):
    student, rows = model(), Sequences()
    losses = F.cross_entropy(student(rows.x).logits.transpose(1, 2), rows.labels, reduction="none")
    loss = (losses.sum(1) / (rows.labels != IGNORED).sum(1)).mean()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(student.parameters()))])
    before = weights(student)
    KDTrainer(
        model=student, train_dataset=rows, objective=Objective(task=(1.0, label_term(weights=per_sequence))),
        args=arguments(tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
                       learning_rate=1.0, max_grad_norm=0.0, max_steps=1),
    ).train()  # fmt: skip
    torch.testing.assert_close(before - weights(student), expected)


TRAIN_ON_TWO_PROCESSES = """
import sys, torch
from torch import nn
sys.path.insert(0, sys.argv[1])
import kd.common
from kd_testing.tiny import Rows, arguments, kd, model
from kd.common.losses import feature_l2
from kd.common.metrics.quality import classification_metrics
from kd.common.objective import FeatureTerm, Objective, task_loss
from kd.common.training.trainer import KDTrainer
from kd.common.utils.devices import end_processes
batch = 8 // int(sys.argv[3])
student, teacher = model(width=4), model(9)
torch.manual_seed(1)
hint = FeatureTerm("hidden", "hidden", feature_l2, nn.Linear(4, 8))
objective = Objective(task=(1.0, task_loss()), hint=(1.0, hint))
trainer = KDTrainer(model=student, teacher=teacher, objective=objective, train_dataset=Rows(24),
    args=arguments(sys.argv[2], per_device_train_batch_size=batch, num_train_epochs=2, logging_strategy="epoch"))
trainer.train()
if trainer.is_world_process_zero():
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    parts = [[entry[k] for k in ("loss", "loss_task", "loss_hint")] for entry in logged]
    torch.save({"student": trainer.accelerator.unwrap_model(student).state_dict(),
                "hint": objective.state_dict(), "logged": torch.tensor(parts)}, sys.argv[2] + "/out.pt")
end_processes()
"""


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path):
    results = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        script = folder / "train.py"
        script.write_text(TRAIN_ON_TWO_PROCESSES)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [
            sys.executable,
            *launcher,
            str(script),
            str(REPO / "tests"),
            str(folder),
            str(processes),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stderr[-6000:]
        results.append(torch.load(folder / "out.pt", weights_only=True))
    one, two = results
    for part in ("student", "hint"):
        for name in one[part]:
            torch.testing.assert_close(one[part][name], two[part][name])
    torch.testing.assert_close(one["logged"], two["logged"])


def test_teacher_stays_frozen_in_eval_mode_and_out_of_optimizer_and_checkpoint(tmp_path):
    teacher = model(9, dropout=0.5).train()
    modes = []
    teacher.register_forward_hook(lambda module, *_: modes.append((module.training, torch.is_grad_enabled())))
    before = weights(teacher)
    trainer = trained(tmp_path, model(), teacher=teacher, save_strategy="epoch")
    assert set(modes) == {(False, False)}
    assert torch.equal(weights(teacher), before)
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in trainer.model.parameters()}
    saved = last_checkpoint(tmp_path)
    from safetensors.torch import load_file

    assert set(load_file(f"{saved}/model.safetensors")) == set(TinyClassifier().state_dict())


def test_auxiliary_parameters_are_optimized_clipped_checkpointed_and_not_shipped(tmp_path):
    torch.manual_seed(1)
    hint = FeatureTerm("hidden", "hidden", feature_l2, nn.Linear(4, 8))
    objective = Objective(hint=(1000.0, hint))
    before = weights(hint)
    student = model(width=4)
    student_before = weights(student)
    trainer = trained(tmp_path, student, objective, learning_rate=1.0, max_grad_norm=0.01, save_strategy="epoch")
    moved = torch.cat([weights(hint) - before, weights(student) - student_before]).norm()
    assert 0 < moved <= 3 * 0.01 + 1e-6  # three steps, each clipped together to 0.01
    assert (weights(hint) != before).any()
    from safetensors.torch import load_file

    checkpoint = last_checkpoint(tmp_path)
    kept = load_file(f"{checkpoint}/objective.safetensors")
    assert torch.equal(kept["modules_of_terms.hint.projector.weight"], hint.projector.weight)
    assert not any("regressor" in name for name in load_file(f"{checkpoint}/model.safetensors"))
    assert any(entry.get("loss_hint") for entry in trainer.state.log_history)


def test_parts_of_the_loss_are_logged_and_add_up(tmp_path):
    trainer = trained(tmp_path, model(), num_train_epochs=3, logging_strategy="epoch", gradient_accumulation_steps=2)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 3
    for entry in entries:
        assert entry["loss_task"] + entry["loss_soft_targets"] == pytest.approx(entry["loss"], rel=1e-4)
        assert entry["loss_soft_targets"] > 0


@pytest.mark.parametrize("shuffled", [False, True])
def test_cached_teacher_outputs_train_the_same_student_as_the_live_teacher(tmp_path, shuffled):
    rows, teacher = Rows(24), model(9)
    order = torch.randperm(24) if shuffled else torch.arange(24)
    with torch.no_grad():
        cached = TeacherOutputs(order, teacher(rows.x[order]).logits)
    live, from_cache = model(), model()
    random_order = {"train_sampling_strategy": "random", "num_train_epochs": 3}
    trained(tmp_path / "live", live, teacher=teacher, **random_order)
    trained(tmp_path / "cache", from_cache, teacher_outputs=cached, **random_order)
    torch.testing.assert_close(weights(from_cache), weights(live))


@pytest.mark.parametrize("save_steps", [3, 4])
def test_resuming_ends_in_the_same_weights(tmp_path, save_steps):
    """Steps 3 and 6 are the last of an epoch, step 4 is not."""
    settings = {
        "num_train_epochs": 4, "optim": "adamw_torch", "save_strategy": "steps", "save_steps": save_steps,
        "train_sampling_strategy": "random", "save_total_limit": 10,
    }  # fmt: skip
    whole = model(dropout=0.3)
    trained(tmp_path, whole, **settings)
    resumed = model(3, dropout=0.3)
    trained(tmp_path, resumed, resume=str(tmp_path / f"checkpoint-{save_steps}"), **settings)
    assert torch.equal(weights(resumed), weights(whole))


def test_auxiliary_parameters_resume_too(tmp_path):
    def hinted(seed):
        torch.manual_seed(seed)
        return Objective(
            hint=(1.0, FeatureTerm("hidden", "hidden", feature_l2, nn.Linear(4, 8))), task=(1.0, task_loss())
        )

    settings = {"num_train_epochs": 2, "optim": "adamw_torch", "save_strategy": "epoch"}
    whole, resumed = hinted(1), hinted(2)
    trained(tmp_path, model(width=4), whole, **settings)
    trained(tmp_path, model(3, width=4), resumed, resume=str(tmp_path / "checkpoint-3"), **settings)
    assert torch.equal(weights(resumed), weights(whole))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path):
    calls = []

    def explodes_on_the_fifth(student, teacher, labels):
        calls.append(1)
        return student.logits.mean() * (float("inf") if len(calls) == 5 else 1.0)

    student, objective = model(), Objective(task=(1.0, task_loss()), bad=(1.0, explodes_on_the_fifth))
    with pytest.raises(UserError, match=r"not finite at step 5 \(bad = -?inf\);.*checkpoint-3") as stopped:
        trained(tmp_path, student, objective, num_train_epochs=2, save_strategy="epoch")
    assert "\n" not in str(stopped.value)
    assert torch.isfinite(weights(student)).all()


def test_values_have_a_separate_learning_rate_and_no_weight_decay(tmp_path):
    from kd.common.bottleneck.module import DiscreteKeyValueBottleneck

    class WithBottleneck(nn.Module):
        def __init__(self):
            super().__init__()
            self.bottleneck = DiscreteKeyValueBottleneck(6, 3, codebooks=2, codebook_size=4)

        def forward(self, x):
            return Outputs(logits=self.bottleneck(x))

    student = WithBottleneck()
    student.bottleneck.fit_keys(Rows(24).x)
    keys = student.bottleneck.keys.clone()
    trainer = trained(
        tmp_path, student, Objective(task=(1.0, task_loss())), optim="adamw_torch", weight_decay=0.5,
        learning_rate=0.01, value_learning_rate=0.3,
    )  # fmt: skip
    groups = {id(p): (g["lr"], g["weight_decay"]) for g in trainer.optimizer.param_groups for p in g["params"]}
    assert groups[id(student.bottleneck.values)] == (0.3, 0.0)
    assert groups[id(student.bottleneck.decoder.weight)] == (0.01, 0.5)
    assert len(groups) == len(list(student.parameters()))
    assert torch.equal(student.bottleneck.keys, keys)


def test_evaluation_computes_logits_and_labels_without_the_teacher(tmp_path):
    def fail(*_):
        raise AssertionError("the teacher ran on evaluation data")

    teacher = model(9)
    teacher.register_forward_hook(fail)
    trainer = KDTrainer(
        model=model(), args=arguments(tmp_path), objective=kd(), teacher=teacher, train_dataset=Rows(8),
        eval_dataset=Rows(10), compute_metrics=lambda p: classification_metrics(p.predictions, p.label_ids),
    )  # fmt: skip
    assert 0 <= trainer.evaluate()["eval_accuracy"] <= 1


# ---- batches of similar length ----


def test_length_groups_contain_every_sample_once_with_little_padding():
    lengths = torch.randint(3, 60, (1003,)).tolist()
    sampler = LengthGroupedSampler(lengths, 8, seed=0)
    order = list(sampler)
    assert sorted(order) == list(range(1003))
    batches = [order[i : i + 8] for i in range(0, 1003, 8)]
    padding = sum(max(lengths[i] for i in b) * len(b) - sum(lengths[i] for i in b) for b in batches) / sum(lengths)
    assert padding < 0.15  # random batches of these lengths: about 0.7


def test_length_groups_depend_only_on_seed_and_epoch():
    def orders(seed):
        sampler = LengthGroupedSampler(list(range(100)), 8, seed)
        first = list(sampler)
        torch.randn(7)
        sampler.set_epoch(1)
        return first, list(sampler)

    assert orders(0) == orders(0)
    assert orders(0)[0] != orders(0)[1]
    assert orders(0)[0] != orders(1)[0]


def test_the_learning_rate_falls_to_a_tenth_after_each_milestone(tmp_path):
    args = arguments(tmp_path, num_train_epochs=4, lr_milestones=[1, 3], logging_strategy="steps", logging_steps=1)
    trainer = KDTrainer(model=model(), args=args, objective=Objective(task=(1.0, task_loss())), train_dataset=Rows(24))
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([0.05] * 3 + [0.005] * 6 + [0.0005] * 3)  # three steps an epoch


@pytest.mark.parametrize("decay_all", [False, True])
def test_weight_decay_excludes_biases_and_norms_by_default(decay_all, tmp_path):
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 2))
    args = arguments(tmp_path, weight_decay=0.1, decay_norm_and_bias=decay_all)
    hint = FeatureTerm("hidden", "hidden", feature_l2, nn.Linear(2, 3))  # its weights are auxiliary parameters
    trainer = KDTrainer(model=network, args=args, objective=Objective(task=(1.0, task_loss()), hint=(1.0, hint)))
    decayed = {
        id(p) for group in trainer.create_optimizer().param_groups if group["weight_decay"] for p in group["params"]
    }
    assert {id(p) in decayed for p in hint.parameters()} == {decay_all}
    names = {name for name, parameter in network.named_parameters() if id(parameter) in decayed}
    all_names = {name for name, _ in network.named_parameters()}
    assert names == (all_names if decay_all else {"0.weight", "2.weight"})


def test_drop_last_applies_to_training_and_not_to_evaluation(tmp_path):
    args = arguments(
        tmp_path, per_device_train_batch_size=10, per_device_eval_batch_size=10, dataloader_drop_last=True
    )
    trainer = KDTrainer(model=model(), args=args, objective=Objective(task=(1.0, task_loss())), train_dataset=Rows(24))
    assert [len(batch["labels"]) for batch in trainer.get_train_dataloader()] == [10, 10]
    assert sum(len(batch["labels"]) for batch in trainer.get_eval_dataloader(Rows(24))) == 24


def test_a_model_that_was_trained_before_trains_in_the_same_precision_again(tmp_path):
    """accelerate marks prepared models and their copies; a marked model would silently train in fp32."""
    seen = []

    class Watched(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model()

        def forward(self, x):
            seen.append(torch.is_autocast_enabled("cpu"))
            return self.inner(x)

    network = Watched()
    for _ in range(2):
        args = arguments(tmp_path, precision="bf16")
        trainer = KDTrainer(
            model=network, args=args, objective=Objective(task=(1.0, task_loss())), train_dataset=Rows(24)
        )
        trainer.train()
        trainer.finish()
        network = copy.deepcopy(network)
    assert len(seen) == 6 and all(seen)
    network(Rows(4).x)
    assert not seen[-1], "autocast is removed"


# ---- weights that diverge after the last finite loss ----


@pytest.mark.parametrize("settings", [{"max_steps": 2}, {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}])
def test_weights_that_diverge_in_the_last_step_are_neither_saved_nor_returned(settings, tmp_path, monkeypatch):
    break_second_step(monkeypatch)
    with pytest.raises(UserError, match=r"hidden\.weight is not finite after step 2; try a lower") as stopped:
        trained(tmp_path, model(), **settings)
    assert "\n" not in str(stopped.value)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_diverged_weights_of_the_objective_stop_the_run_too(tmp_path):
    objective = Objective(
        task=(1.0, task_loss()), hint=(1.0, FeatureTerm("hidden", "hidden", feature_l2, nn.Linear(8, 8)))
    )
    with torch.no_grad():
        objective.register_buffer("memory", torch.zeros(2))
        objective.memory[0] = torch.nan
    with pytest.raises(UserError, match="memory is not finite after step 3"):
        trained(tmp_path, model(), objective, save_strategy="epoch")


# ---- batches of one before batch norm ----


class Normed(TinyClassifier):
    def __init__(self, length: int = 1) -> None:
        super().__init__()
        self.norm, self.length = nn.BatchNorm1d(6), length

    def forward(self, x):
        return super().forward(self.norm(x.unsqueeze(-1).repeat(1, 1, self.length)).mean(-1))


@pytest.mark.parametrize(("samples", "batch", "accumulation"), [(25, 8, 1), (25, 4, 2), (24, 1, 1), (1, 8, 1)])
def test_a_batch_of_one_sample_before_batch_norm_is_an_error_at_the_first_step(samples, batch, accumulation, tmp_path):
    student = Normed()
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(UserError, match="--dataloader_drop_last, or another --per_device_train_batch_size") as line:
        trained(
            tmp_path, student, n=samples, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation
        )
    assert "\n" not in str(line.value)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


@pytest.mark.parametrize(
    ("student", "settings"),
    [
        (Normed(), {"dataloader_drop_last": True}),
        (Normed(), {"max_steps": 3}),  # ends before that batch
        (Normed(length=2), {}),  # two values per channel
        (model(), {}),
    ],
)
def test_a_last_batch_of_one_sample_trains_if_no_batch_norm_needs_more(student, settings, tmp_path):
    trainer = trained(tmp_path, student, n=25, **settings)
    assert trainer.state.global_step == (3 if settings else 4)


# ---- Ctrl-C ----


class Finalized:
    """Presses Ctrl-C where Python drops exceptions."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("dropped", [True, False])
@pytest.mark.parametrize("step", [5, 12])
def test_ctrl_c_ends_training_even_if_python_drops_it_and_the_run_can_resume(dropped, step, tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    settings = {"num_train_epochs": 4, "save_strategy": "epoch", "optim": "adamw_torch"}
    whole, stopped, resumed = model(dropout=0.3), model(dropout=0.3), model(7, dropout=0.3)
    trained(tmp_path / "whole", whole, **settings)
    calls = []

    def press(*_) -> None:
        calls.append(1)
        if len(calls) == step:
            Finalized() if dropped else os.kill(os.getpid(), signal.SIGINT)

    handle = stopped.register_forward_hook(press)
    try:
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "run", stopped, **settings)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(calls) == step, "no further step"
    handle.remove()
    trained(tmp_path / "run", resumed, resume=True, **settings)
    assert torch.equal(weights(resumed), weights(whole))
