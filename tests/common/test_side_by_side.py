"""Students that share a teacher pass end as if trained alone; a table of views holds the teacher's logits."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from kd.common.losses import feature_l2
from kd.common.objective import FeatureTerm, Objective, task_loss
from kd.common.outputs import Outputs
from kd.common.training.side_by_side import SideBySide, SideBySideObjective
from kd.common.training.teacher_outputs import TeacherViews
from kd.common.training.trainer import KDTrainer
from kd.common.utils.errors import UserError
from kd_testing.tiny import Rows, TinyClassifier, arguments, kd, model


class CountingTeacher(TinyClassifier):
    """Counts the samples of its forward passes."""

    samples = 0

    def forward(self, x):
        self.samples += x.shape[0]
        return super().forward(x)


def teacher() -> CountingTeacher:
    torch.manual_seed(9)
    return CountingTeacher()


def batch_size(student: Outputs, teacher: Outputs | None, labels: torch.Tensor | None) -> torch.Tensor:
    assert labels is not None
    return torch.tensor(float(len(labels)))


def objectives() -> dict[str, Objective]:
    torch.manual_seed(3)
    return {
        "kd": kd(),
        "hint": Objective(
            task=(1.0, task_loss()), hint=(0.5, FeatureTerm("inner", "hidden", feature_l2, nn.Linear(8, 8)))
        ).watching(size=batch_size),
        "match": Objective(hidden=(1.0, FeatureTerm("hidden", "hidden", feature_l2))),
    }


def test_students_side_by_side_end_as_if_trained_alone(tmp_path):
    settings = {"num_train_epochs": 3, "max_grad_norm": 0.0, "logging_strategy": "epoch", "optim_args": "momentum=0.9"}
    alone, logged = {}, {}
    for number, (name, objective) in enumerate(objectives().items()):
        alone[name] = model(number)
        trainer = KDTrainer(
            model=alone[name],
            args=arguments(tmp_path / name, **settings),
            objective=objective,
            teacher=teacher(),
            features={"inner": "hidden"} if name == "hint" else {},
            train_dataset=Rows(),
        )
        trainer.train()
        logged[name] = trainer.state.log_history[0]
    together = SideBySide({name: model(number) for number, name in enumerate(alone)})
    one_teacher = teacher()
    trainer = KDTrainer(
        model=together,
        args=arguments(tmp_path / "together", **settings),
        objective=SideBySideObjective(objectives()),
        teacher=one_teacher,
        features=SideBySide.paths({"hint": {"inner": "hidden"}}),
        train_dataset=Rows(),
    )
    trainer.train()
    assert one_teacher.samples == 3 * len(Rows()), "one pass of the teacher for all of them"
    for name, student in alone.items():
        for key, weight in student.state_dict().items():
            torch.testing.assert_close(together.students[name].state_dict()[key], weight, msg=f"{name} {key}")
        for part, value in logged[name].items():
            if part.startswith("loss_"):
                assert np.isclose(trainer.state.log_history[0][f"loss_{name}/{part.removeprefix('loss_')}"], value)
    assert trainer.state.log_history[0]["hint/size"] == 8  # watched, not trained for


def exploding(loud: bool) -> Objective:
    """A loss that is infinite at its fifth step; if `loud`, its gradient is too."""
    steps = []

    def infinite_once(student: Outputs, teacher: Outputs | None, labels: torch.Tensor | None) -> torch.Tensor:
        steps.append(1)
        assert student.logits is not None
        factor = float("inf") if len(steps) == 5 else 1.0
        return student.logits.square().mean() * factor if loud else student.logits.mean() + (factor - 1.0)

    return Objective(task=(1.0, task_loss()), bad=(1.0, infinite_once))


def train_students(folder, students: dict[str, Objective], **settings) -> KDTrainer:
    together = SideBySide({name: model(number) for number, name in enumerate(students)})
    each_epoch = {"logging_strategy": "epoch", "save_strategy": "epoch"}
    args = arguments(folder, max_grad_norm=0.0, optim_args="momentum=0.9", **each_epoch, **settings)
    objective = SideBySideObjective(students)
    trainer = KDTrainer(model=together, args=args, objective=objective, teacher=teacher(), train_dataset=Rows())
    trainer.train(resume_from_checkpoint=settings.get("resume_from_checkpoint"))
    return trainer


def test_a_diverged_student_stays_diverged_and_leaves_the_others_unaffected(tmp_path, caplog):
    spared = train_students(tmp_path / "spared", {"kd": kd()}, num_train_epochs=4).model.students["kd"].state_dict()
    students = {"kd": kd(), "loud": exploding(True), "quiet": exploding(False)}
    caplog.clear()
    trainer = train_students(tmp_path / "diverged", students, num_train_epochs=4)
    steps = len(Rows()) // 8
    assert steps < 5 < 2 * steps, "in the second epoch"
    logs = [record.getMessage() for record in caplog.records if " diverged: " in record.getMessage()]
    assert logs[0] == "loud diverged: its loss is not finite at step 5 (loud/bad = inf)"
    assert logs[1].startswith("quiet diverged: its loss is not finite at step 5 (quiet/bad = ") and len(logs) == 2
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    json.dumps(trainer.state.log_history, allow_nan=False)
    assert [{key for key in entry if "/" in key} for entry in losses[1:]] == [
        {"loss_kd/task", "loss_kd/soft_targets"}
    ] * 3
    assert "loss_quiet/bad" in losses[0]
    resumed = train_students(
        tmp_path / "diverged",
        {"kd": kd(), "loud": kd(), "quiet": kd()},  # these losses are finite again
        num_train_epochs=4,
        resume_from_checkpoint=str(tmp_path / "diverged" / f"checkpoint-{3 * steps}"),
    )
    for trained in (trainer.model.students, resumed.model.students):
        for key, weight in trained["kd"].state_dict().items():
            assert torch.equal(weight, spared[key]), "the others end as if trained without it"
        assert not any(weight.isfinite().all() for name in ("loud", "quiet") for weight in trained[name].parameters())


def test_training_stops_once_every_student_has_diverged(tmp_path):
    trainer = train_students(tmp_path, {"one": exploding(True), "other": exploding(False)}, num_train_epochs=4)
    assert trainer.state.global_step == 5
    json.dumps(trainer.state.log_history, allow_nan=False)


def test_only_the_student_that_diverges_in_the_last_step_is_reported(tmp_path, caplog):
    def no_gradient_on_the_last_step(student, teacher, labels):
        loss = (student.logits * 0.0).sum()
        steps.append(1)
        return loss.sqrt() if len(steps) == 3 else loss  # 0, and its derivative infinite

    steps: list[int] = []
    broken = Objective(task=(1.0, task_loss()), bad=(1.0, no_gradient_on_the_last_step))
    spared = train_students(tmp_path / "spared", {"kd": kd()}, num_train_epochs=1).model.students["kd"].state_dict()
    trainer = train_students(tmp_path / "run", {"kd": kd(), "broken": broken}, num_train_epochs=1)
    assert [record.getMessage() for record in caplog.records if "diverged" in record.getMessage()] == [
        "broken diverged: hidden.weight is not finite after step 3"
    ]
    assert all(torch.equal(value, spared[key]) for key, value in trainer.model.students["kd"].state_dict().items())


class ViewRows(Rows):
    """Three views of each sample (unchanged, negated, doubled), one of which is drawn in each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.views = torch.randint(3, (len(self),), generator=torch.Generator().manual_seed(epoch))

    def __getitem__(self, i):
        factor = torch.tensor([1.0, -1.0, 2.0])[self.views[i]]
        return super().__getitem__(i) | {"x": self.x[i] * factor, "view": self.views[i]}


def train_on_views(folder, views, teacher: CountingTeacher, **settings) -> TinyClassifier:
    student = model(1)
    args = arguments(folder, num_train_epochs=6, train_sampling_strategy="random", **settings)
    KDTrainer(
        model=student, args=args, objective=kd(0.0), teacher=teacher, teacher_views=views, train_dataset=ViewRows()
    ).train()
    return student


def test_a_table_of_views_returns_the_teachers_logits_and_computes_them_once(tmp_path):
    live, first, second = teacher(), teacher(), teacher()
    plain = train_on_views(tmp_path / "live", None, live)
    tables = [TeacherViews(tmp_path / "views", "key", samples=24, views=3, classes=3) for _ in range(2)]
    filled = train_on_views(tmp_path / "first", tables[0], first)
    read = train_on_views(tmp_path / "second", tables[1], second)
    for one, two in ((filled, read), (plain, filled)):
        tolerance = 0 if one is filled else 1e-3  # logits in fp16
        for a, b in zip(one.parameters(), two.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert live.samples == 6 * 24
    assert first.samples == (tables[0].checksums != 0).sum() < live.samples
    assert second.samples == 0, "the second run reads all logits from the table"


class CountedLogits:
    """Logits for each sample and view; counts the rows that are computed."""

    def __init__(self) -> None:
        self.samples, self.views = torch.arange(72) // 3, torch.arange(72) % 3
        self.logits = torch.randn(72, 3).half().float()
        self.computed = 0

    def read(self, folder) -> torch.Tensor:
        """All rows of the table in a folder, in the batches of a shuffled epoch."""
        table = TeacherViews(folder, "key", samples=24, views=3, classes=3)
        found = torch.full((72, 3), torch.nan)
        for batch in torch.randperm(72).split(10):
            compute = partial(self.compute, batch)
            logits = table.batch(self.samples[batch], self.views[batch], compute).logits
            assert logits is not None
            found[batch] = logits
        return found

    def compute(self, batch: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        self.computed += len(rows)
        return self.logits[batch[rows]]


def cut_off(content: bytearray) -> bytes:
    return bytes(content[: len(content) // 2])


def zeroed(content: bytearray) -> bytes:
    third = len(content) // 3
    return bytes(content[:third]) + bytes(third) + bytes(content[2 * third :])


def flipped(content: bytearray) -> bytes:
    content[len(content) // 2] ^= 1
    return bytes(content)


def swapped(content: bytearray) -> bytes:
    half = len(content) // 2
    return bytes(content[half:] + content[:half])


@pytest.mark.parametrize("damage", [cut_off, zeroed, flipped, swapped, lambda content: b""])
@pytest.mark.parametrize("name", ["logits.f16", "checksums.u32", "shape.json"])
def test_rows_of_a_damaged_table_are_computed_again(name, damage, tmp_path, caplog):
    logits = CountedLogits()
    for _ in range(2):
        assert torch.equal(logits.read(tmp_path), logits.logits) and logits.computed == 72
    (file,) = tmp_path.rglob(name)
    whole = file.read_bytes()
    file.write_bytes(damage(bytearray(whole)))
    for _ in range(2):
        assert torch.equal(logits.read(tmp_path), logits.logits)
    damaged = {cut_off: 36, zeroed: 24, flipped: 1, swapped: 72}.get(damage, 72) if name != "shape.json" else 0
    assert logits.computed == 72 + damaged, "damaged rows are computed once more"
    assert file.read_bytes() == whole
    empty = name == "checksums.u32" and damage not in (flipped, swapped)  # looks as if never filled
    assert ("is damaged" in caplog.text) == (damaged > 0 and not empty)


def test_rows_of_a_table_of_another_shape_do_not_match(tmp_path):
    logits = CountedLogits()
    logits.read(tmp_path)
    other = TeacherViews(tmp_path, "key", samples=36, views=2, classes=3)
    outputs = other.batch(
        torch.arange(36), torch.ones(36, dtype=torch.long), lambda rows: torch.full((len(rows), 3), 7.0)
    )
    assert outputs.logits.eq(7).all()


def test_two_processes_can_fill_a_table_at_once(tmp_path):
    first, second = (TeacherViews(tmp_path, "key", samples=24, views=3, classes=3) for _ in range(2))
    logits, samples, views = torch.randn(24, 3).half().float(), torch.arange(24), torch.ones(24, dtype=torch.long)

    def compute_in_both(rows: torch.Tensor) -> torch.Tensor:
        second.batch(samples[rows], views[rows], lambda inner: logits[rows][inner])
        return logits[rows]

    def never(rows: torch.Tensor) -> torch.Tensor:
        raise AssertionError("already filled")

    assert torch.equal(first.batch(samples, views, compute_in_both).logits, logits)
    assert torch.equal(second.batch(samples, views, never).logits, logits)


def test_a_full_disk_is_an_error_of_one_line(tmp_path, monkeypatch):
    table = TeacherViews(tmp_path, "key", samples=24, views=3, classes=3)
    table.logits.filename.unlink()
    table.logits.filename.symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"cannot write .*logits\.f16: No space left on device"):
        table.batch(torch.arange(4), torch.zeros(4, dtype=torch.long), lambda rows: torch.ones(len(rows), 3))
    assert not table.checksums.any()


def test_rows_of_the_table_are_the_teachers_logits_for_those_views(tmp_path):
    rows, model = ViewRows(), teacher().eval()
    table = TeacherViews(tmp_path, "key", samples=24, views=3, classes=3)
    train_on_views(tmp_path / "run", table, model)
    for sample in range(24):
        for view, factor in enumerate((1.0, -1.0, 2.0)):
            stored = torch.from_numpy(table.logits[sample * 3 + view].astype(np.float32))
            if table.checksums[sample * 3 + view]:
                expected = model(rows.x[sample : sample + 1] * factor).logits[0].detach().half().float()
                torch.testing.assert_close(stored, expected, rtol=1e-3, atol=1e-3)
            else:
                assert not stored.any()
