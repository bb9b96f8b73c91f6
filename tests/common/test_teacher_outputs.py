"""Cached teacher outputs cannot be misaligned, mixed up with another teacher's, or read when damaged."""

import logging
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate import PartialState
from torch import nn

from kd.common.data.fingerprints import outputs_key
from kd.common.outputs import EnsembleTeacher
from kd.common.training import teacher_outputs
from kd.common.training.teacher_outputs import (
    JoinedOutputs,
    TeacherOutputs,
    cache_outputs,
    cache_teacher_outputs,
)
from kd_testing.processes import in_processes
from kd_testing.tiny import model

KEY = "a" * 64


def outputs(order: torch.Tensor) -> TeacherOutputs:
    """Sample i has logits (i, -i) and 1 + i % 3 positions, all of them i."""
    states = [torch.full((1 + int(i) % 3, 2), float(i)) for i in order]
    return TeacherOutputs(order, torch.stack([order, -order], 1).float(), {"layer_1": states})


def test_outputs_are_looked_up_by_sample_id_in_any_order():
    for _ in range(5):
        cache = outputs(torch.randperm(50) + 1000)
        ids = torch.randperm(50)[:13] + 1000
        found = cache.batch(ids, positions=4)
        assert torch.equal(found.logits, torch.stack([ids, -ids], 1).float())
        for row, sample in enumerate(ids):
            length = 1 + int(sample) % 3
            assert (found.features["layer_1"][row, :length] == sample).all()
            assert (found.features["layer_1"][row, length:] == 0).all()
        assert found.features["layer_1"].shape == (13, 4, 2)


@pytest.mark.parametrize("unknown", [-1, 7, 2000])
def test_a_sample_that_is_not_in_the_cache_is_an_error(unknown):
    with pytest.raises(KeyError, match=str(unknown)):
        outputs(torch.arange(50) + 1000).batch(torch.tensor([1001, unknown]))


def test_sample_ids_must_be_distinct():
    with pytest.raises(ValueError, match="distinct"):
        TeacherOutputs(torch.tensor([1, 2, 1]), torch.zeros(3, 2))


@pytest.mark.parametrize("weights, shares", [(None, (0.5, 0.5)), ([3.0, 1.0], (0.75, 0.25))])
def test_averaged_teachers_have_the_mean_of_logits_as_their_caches_have(weights, shares):
    teachers = [model(0), model(1)]
    x = torch.randn(3, 6)
    logits = [teacher(x).logits for teacher in teachers]
    averaged = EnsembleTeacher(teachers, weights=weights)(x).logits
    torch.testing.assert_close(averaged, shares[0] * logits[0] + shares[1] * logits[1])
    samples = torch.arange(3)
    joined = JoinedOutputs([TeacherOutputs(samples, each) for each in logits], weights)
    torch.testing.assert_close(joined.batch(samples).logits, averaged)


def test_joined_caches_have_the_mean_of_logits_and_all_features():
    ids = torch.arange(6)
    other = TeacherOutputs(ids.flip(0), torch.stack([ids, ids], 1).flip(0).float())
    joined = JoinedOutputs([outputs(ids), other, TeacherOutputs(ids, features={"pooled": torch.ones(6, 3)})])
    found = joined.batch(torch.tensor([4, 1]))
    assert torch.equal(found.logits, torch.tensor([[4.0, 0.0], [1.0, 0.0]]))
    assert found.features["layer_1"].shape == (2, 2, 2) and found.features["pooled"].shape == (2, 3)


# ---- on disk ----


class Embedder(nn.Module):
    """Input ids (batch, positions) -> hidden states (batch, positions, 4) and logits (batch, 3), their sums."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden = nn.Embedding(20, 4)
        nn.init.uniform_(self.hidden.weight, 0.5 * scale, scale)
        self.calls = 0

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        self.calls += 1
        states = self.hidden(input_ids) * attention_mask.unsqueeze(-1)
        return SimpleNamespace(logits=states.sum(1)[:, :3])


def texts(number: int = 100) -> datasets.Dataset:
    """Rows of 1 to 9 tokens, with sample ids in no order."""
    numbers = random.Random(0)
    ids = [[numbers.randrange(20) for _ in range(numbers.randrange(1, 10))] for _ in range(number)]
    samples = numbers.sample(range(1000), number)
    return datasets.Dataset.from_dict({"input_ids": ids, "sample_id": samples, "length": [len(row) for row in ids]})


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    ids = [row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows]
    mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
    found = {"input_ids": ids, "attention_mask": mask, "sample_id": [row["sample_id"] for row in rows]}
    return {name: torch.tensor(values) for name, values in found.items()}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(teacher_outputs, "SHARD_BATCHES", 2)


def cached(folder: Path, teacher: Any, rows: datasets.Dataset | None = None, **kwargs: Any) -> TeacherOutputs:
    settings: dict[str, Any] = {"features": {"states": "hidden"}, "batch_size": 8} | kwargs
    return cache_teacher_outputs(teacher, rows or texts(), collate, folder, **settings)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_values(cache: TeacherOutputs, teacher: Embedder, rows: datasets.Dataset, precise: bool = False) -> None:
    chosen = [rows[i] for i in (3, 99, 0, 41)]
    batch = collate(chosen)
    found = cache.batch(batch.pop("sample_id"), batch["input_ids"].shape[1])
    assert found.features is not None
    torch.testing.assert_close(found.logits, teacher(**batch).logits.detach())
    states = found.features["states"]
    assert states.dtype == (torch.float32 if precise else torch.float16)
    expected = teacher.hidden(batch["input_ids"]) * batch["attention_mask"].unsqueeze(-1)
    torch.testing.assert_close(states.float(), expected.detach(), rtol=1e-3, atol=1e-3)


def test_outputs_are_those_of_the_live_teacher_and_computed_once(tmp_path):
    teacher, rows = Embedder(), texts()
    check_values(cached(tmp_path, teacher, rows), teacher, rows)
    calls = teacher.calls
    again = cached(tmp_path, teacher, rows)
    assert teacher.calls == calls
    check_values(again, teacher, rows)
    assert len(list(tmp_path.glob("*/*"))) == 7  # shards of 16 of 100 rows


def test_features_out_of_the_range_of_fp16_are_stored_in_fp32(tmp_path):
    teacher, rows = Embedder(scale=1e5), texts()
    check_values(cached(tmp_path, teacher, rows), teacher, rows, precise=True)


def test_a_batch_of_rows_in_fp16_and_in_fp32(tmp_path):
    teacher, rows = Embedder(), texts()
    with torch.no_grad():
        teacher.hidden.weight[7] = 1e5
    ids = torch.tensor([row["sample_id"] for row in rows])
    states = cached(tmp_path, teacher, rows).batch(ids).features["states"]
    assert states.isfinite().all() and states.max() == 1e5


def test_shards_are_columns_of_datasets(tmp_path):
    cached(tmp_path, Embedder())
    path = sorted(tmp_path.glob("*/*/outputs.arrow"))[0]
    rows = datasets.Dataset.from_file(str(path)).with_format("numpy")
    assert rows.column_names == ["sample_id", "states", "logits"]
    assert np.asarray(rows[3]["states"]).shape == (len(rows[3]["states"]), 4) and rows[3]["logits"].shape == (3,)


class Killed(BaseException):
    pass


def test_a_killed_process_continues_after_its_last_complete_shard_with_the_same_bytes(tmp_path, monkeypatch):
    teacher = Embedder()
    whole = cached(tmp_path / "whole", teacher)
    calls, write = teacher.calls, teacher_outputs._write

    def killed_at_the_fourth(folder: Path, *args) -> None:
        if folder.name == "00003":
            raise Killed
        write(folder, *args)

    monkeypatch.setattr(teacher_outputs, "_write", killed_at_the_fourth)
    with pytest.raises(Killed):
        cached(tmp_path / "killed", teacher)
    monkeypatch.setattr(teacher_outputs, "_write", write)
    teacher.calls = 0
    continued = cached(tmp_path / "killed", teacher)
    assert teacher.calls < calls
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    ids = whole.sample_ids[:9]
    assert torch.equal(continued.batch(ids).features["states"], whole.batch(ids).features["states"])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-30] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def make_foreign(path):
    other = path.parent.parent / "00001" / path.name
    for name in (path.name, "SHA256SUMS"):
        path.with_name(name).write_bytes(other.with_name(name).read_bytes())


def empty(path):
    path.write_bytes(b"")


def remove(path):
    path.unlink()


def remove_checksums(path):
    path.with_name("SHA256SUMS").unlink()


def spoil_checksums(path):
    path.with_name("SHA256SUMS").write_text("none")


def zero_a_third(path):
    content = path.read_bytes()
    third = len(content) // 3
    path.write_bytes(content[:third] + bytes(third) + content[2 * third :])


def garbage(path):
    path.write_bytes(bytes(range(256)) * 10)


SPOILED = [
    flip_a_bit, truncate, zero_a_third, garbage, make_foreign, empty, remove, remove_checksums, spoil_checksums,
]  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILED)
def test_a_damaged_or_foreign_shard_is_computed_again(tmp_path, caplog, spoil):
    teacher = Embedder()
    cached(tmp_path, teacher)
    before, calls = contents(tmp_path), teacher.calls
    path = sorted(tmp_path.glob("*/*/outputs.arrow"))[0]
    spoil(path)
    (path.parent / "notes.txt").write_text("of a user")
    with caplog.at_level(logging.WARNING):
        cached(tmp_path, teacher)
    assert teacher.calls == calls + 2  # two batches a shard
    assert "computing them again" in caplog.text
    assert (path.parent / "notes.txt").read_text() == "of a user"
    (path.parent / "notes.txt").unlink()
    assert contents(tmp_path) == before


def test_a_shard_of_another_key_is_computed_again(tmp_path):
    teacher = Embedder()
    for key in (KEY, KEY[:20] + "b" * 44, KEY):  # in one folder
        before = teacher.calls
        cache_outputs(teacher, lambda **batch: {"logits": teacher(**batch).logits}, texts(8), collate, tmp_path, key)
        assert teacher.calls == before + 1


def test_any_flipped_bit_is_detected(tmp_path):
    teacher, rows = Embedder(), texts(10)
    cached(tmp_path, teacher, rows)
    (path,) = tmp_path.rglob("outputs.arrow")
    whole, calls = path.read_bytes(), teacher.calls
    for place in range(0, len(whole), 101):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        cached(tmp_path, teacher, rows)
        assert path.read_bytes() == whole
    assert teacher.calls == calls + 2 * len(range(0, len(whole), 101))


def test_two_processes_share_the_work_and_store_the_same_bytes_as_one(tmp_path):
    def call() -> list:
        PartialState(cpu=True)  # joins the group, as training arguments do
        teacher, rows = Embedder(), texts()
        cache = cached(tmp_path / "two", teacher, rows)
        ids = torch.tensor([row["sample_id"] for row in rows])
        return [cache.batch(ids).logits, teacher.calls]

    (first, calls), (second, other_calls) = in_processes(2, tmp_path / "processes", call)
    teacher, rows = Embedder(), texts()
    alone = cached(tmp_path / "one", teacher, rows)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert torch.equal(first, alone.batch(torch.tensor([row["sample_id"] for row in rows])).logits)
    assert torch.equal(first, second)
    assert calls + other_calls == teacher.calls and 0 < other_calls < calls


def test_the_key_depends_on_weights_and_data():
    teacher = model(0)
    key = outputs_key(teacher, "data", "bf16")
    assert key == outputs_key(model(0), "data", "bf16")
    assert key != outputs_key(teacher, "other data", "bf16")
    with torch.no_grad():
        teacher.head.weight[0, 0] += 1e-6
    assert key != outputs_key(teacher, "data", "bf16")


def test_a_cache_is_valid_for_weights_inputs_and_arguments(tmp_path):
    rows, changed = texts(), texts()
    ids = changed["input_ids"][:]
    changed = changed.remove_columns("input_ids").add_column("input_ids", [*ids[:-1], [*ids[-1][:-1], 5]])
    cached(tmp_path, Embedder(), rows)
    cached(tmp_path, Embedder(), rows.add_column("labels", [1] * 100))
    assert len(list(tmp_path.iterdir())) == 1
    for number, (scale, inputs, kwargs) in enumerate(
        [
            (2.0, rows, {}),
            (1.0, changed, {}),
            (1.0, rows.select(range(99)), {}),
            (1.0, rows, {"features": {}}),
            (1.0, rows, {"logits": False}),
            (1.0, rows, {"precision": "bf16"}),
        ]
    ):
        cached(tmp_path, Embedder(scale), inputs, **kwargs)
        assert len(list(tmp_path.iterdir())) == 2 + number
