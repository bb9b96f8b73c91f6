"""Cached teacher outputs can be neither misaligned nor confused with another teacher's, nor read when damaged."""

import logging

import pytest
import torch

from kd.common.training.teacher_outputs import TeacherOutputs, outputs_key
from kd_testing.tiny import model


def outputs(order: torch.Tensor) -> TeacherOutputs:
    """Sample i says logits (i, -i) and has 1 + i % 3 positions, all of them i."""
    lengths = 1 + order % 3
    states = torch.cat([torch.full((int(n), 2), float(i)) for i, n in zip(order, lengths, strict=True)])
    return TeacherOutputs(order, torch.stack([order, -order], 1).float(), {"layer_1": states}, lengths)


def test_lookup_goes_by_sample_id_in_any_order():
    for _ in range(5):
        cache = outputs(torch.randperm(50) + 1000)
        asked = torch.randperm(50)[:13] + 1000
        said = cache.batch(asked, positions=4)
        assert torch.equal(said.logits, torch.stack([asked, -asked], 1).float())
        for row, sample in enumerate(asked):
            length = 1 + int(sample) % 3
            assert (said.features["layer_1"][row, :length] == sample).all()
            assert (said.features["layer_1"][row, length:] == 0).all()
        assert said.features["layer_1"].shape == (13, 4, 2)


@pytest.mark.parametrize("stranger", [-1, 7, 2000])
def test_a_sample_that_was_never_asked_about_is_an_error(stranger):
    with pytest.raises(KeyError, match=str(stranger)):
        outputs(torch.arange(50) + 1000).batch(torch.tensor([1001, stranger]))


def test_sample_ids_must_be_distinct():
    with pytest.raises(ValueError, match="distinct"):
        TeacherOutputs(torch.tensor([1, 2, 1]), torch.zeros(3, 2))


def counting(calls: list[int]):
    def compute() -> TeacherOutputs:
        calls.append(1)
        return outputs(torch.randperm(20))

    return compute


def test_written_once_and_read_afterwards(tmp_path):
    calls: list[int] = []
    first = TeacherOutputs.load_or_compute(tmp_path, "a" * 64, counting(calls))
    again = TeacherOutputs.load_or_compute(tmp_path, "a" * 64, counting(calls))
    assert len(calls) == 1
    asked = torch.tensor([3, 19, 0])
    assert torch.equal(first.batch(asked).logits, again.batch(asked).logits)
    assert torch.equal(first.batch(asked).features["layer_1"], again.batch(asked).features["layer_1"])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def make_foreign(path):
    outputs(torch.arange(20))._write(path, "b" * 64)


def empty(path):
    path.write_bytes(b"")


def keep_the_header(path):
    length = int.from_bytes(path.read_bytes()[:8], "little")
    path.write_bytes(path.read_bytes()[: 8 + length])


def zero_a_third(path):
    content = path.read_bytes()
    third = len(content) // 3
    path.write_bytes(content[:third] + bytes(third) + content[2 * third :])


def garbage(path):
    path.write_bytes(bytes(range(256)) * 10)


@pytest.mark.parametrize("spoil", [flip_a_bit, truncate, keep_the_header, zero_a_third, garbage, make_foreign, empty])
def test_a_damaged_or_foreign_file_is_rebuilt(tmp_path, caplog, spoil):
    calls: list[int] = []
    TeacherOutputs.load_or_compute(tmp_path, "a" * 64, counting(calls))
    (path,) = tmp_path.iterdir()
    spoil(path)
    with caplog.at_level(logging.WARNING):
        TeacherOutputs.load_or_compute(tmp_path, "a" * 64, counting(calls))
    assert len(calls) == 2
    assert "anew" in caplog.text
    TeacherOutputs.load_or_compute(tmp_path, "a" * 64, counting(calls))
    assert len(calls) == 2


def test_a_flipped_bit_anywhere_is_noticed(tmp_path):
    calls: list[int] = []
    TeacherOutputs.load_or_compute(tmp_path, "a" * 64, counting(calls))
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        TeacherOutputs.load_or_compute(tmp_path, "a" * 64, counting(calls), write=False)
    assert len(calls) == 1 + len(range(0, len(whole), 7))


def test_the_key_follows_weights_and_data():
    teacher = model(0)
    key = outputs_key(teacher, "data", "bf16")
    assert key == outputs_key(model(0), "data", "bf16")
    assert key != outputs_key(teacher, "other data", "bf16")
    with torch.no_grad():
        teacher.head.weight[0, 0] += 1e-6
    assert key != outputs_key(teacher, "data", "bf16")
