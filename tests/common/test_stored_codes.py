"""Codes on disk: equal when read, refused when damaged or of other data; bytes by hand."""

import pytest
import torch
from torch import Tensor, nn

from kd.common.bottleneck.module import DiscreteKeyValueBottleneck
from kd.common.bottleneck.sizes import sizes
from kd.common.bottleneck.stored_codes import FILE, pack_codes, stored_tensors, unpack_codes
from kd.common.utils.errors import UserError

SAMPLES = [torch.randint(2**16, (positions, 3)).to(torch.uint16) for positions in (4, 1, 7)]


def unused() -> dict[str, Tensor]:
    raise AssertionError("the codes are stored")


@pytest.mark.parametrize("samples", [SAMPLES, [sample[0] for sample in SAMPLES]], ids=["positions", "pooled"])
def test_codes_are_computed_once(samples, tmp_path):
    tensors = pack_codes("train", samples) | {"usage": torch.tensor(0.1, dtype=torch.float64)}
    stored_tensors(tmp_path / "codes", "key", lambda: tensors)
    found = stored_tensors(tmp_path / "codes", "key", unused)
    assert found["usage"].item() == 0.1
    for sample, expected in zip(unpack_codes("train", found), samples, strict=True):
        assert sample.dtype == torch.uint16 and torch.equal(sample, expected)


def test_damaged_and_other_codes_are_refused(tmp_path):
    folder = tmp_path / "codes"
    stored_tensors(folder, "key", lambda: pack_codes("train", SAMPLES))
    with pytest.raises(UserError, match=f"codes of other data.*: remove {folder}"):
        stored_tensors(folder, "other", unused)
    content = bytearray((folder / FILE).read_bytes())
    content[-1] ^= 1
    (folder / FILE).write_bytes(content)
    with pytest.raises(UserError, match=f"damaged.*: remove {folder}"):
        stored_tensors(folder, "key", unused)


def test_an_interrupted_computation_stores_nothing(tmp_path):
    with pytest.raises(AssertionError):
        stored_tensors(tmp_path / "codes", "key", unused)
    assert not list(tmp_path.iterdir())


def test_bytes_by_hand():
    model = nn.Sequential(
        nn.Linear(6, 6, bias=False),
        DiscreteKeyValueBottleneck(6, 5, codebooks=3, codebook_size=9, decoder="mean", values="counted"),
    )
    keys, values = 3 * 9 * 2 * 4, 3 * 9 * 5 * 4
    expected = {"encoder": 36 * 4, "keys": keys, "values": values, "counts": keys + 3 * 9 * 4 + values + 1}
    assert sizes(model) == expected | {"decoder": 0, "codes_of_an_embedding": 2}  # 3 codes of 4 bits
    assert sizes(model[0]) is None
    one_key = DiscreteKeyValueBottleneck(6, 5, codebooks=3, codebook_size=1)
    assert one_key.code_bits == 0
