"""The discrete key-value bottleneck against brute force, closed forms and an independent implementation."""

import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from vector_quantize_pytorch.vector_quantize_pytorch import Codebook

from kd.common.bottleneck import keys as key_search
from kd.common.bottleneck.keys import nearest_keys
from kd.common.bottleneck.module import DiscreteKeyValueBottleneck


def make(dim: int = 12, outputs: int = 5, **kwargs: object) -> DiscreteKeyValueBottleneck:
    return DiscreteKeyValueBottleneck(dim, outputs, **{"codebooks": 3, "codebook_size": 8, **kwargs})  # type: ignore[arg-type]


def clusters(codebooks: int = 1, per_cluster: int = 200, width: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Heads (rows, codebooks, width) in four tight, far apart clusters, and the clusters' true means."""
    centres = torch.tensor([[10.0, 10.0], [-10.0, 10.0], [10.0, -10.0], [-10.0, -10.0]])
    rows = centres.repeat_interleave(per_cluster, 0) + 0.1 * torch.randn(4 * per_cluster, width)
    return rows.unsqueeze(1).repeat(1, codebooks, 1), rows.view(4, per_cluster, width).mean(1)


# ---- search ----


@pytest.mark.parametrize(
    ("rows", "codebooks", "codebook_size"), [(1, 1, 1), (17, 3, 8), (1000, 4, 64), (100, 2, 500), (50, 2, 4096)]
)
def test_chunked_search_equals_brute_force(monkeypatch, rows, codebooks, codebook_size):
    monkeypatch.setattr(key_search, "SEARCH_BYTES", {"cpu": 7 * 4 * codebooks * codebook_size})  # blocks of seven rows
    heads, keys = torch.randn(rows, codebooks, 6), torch.randn(codebooks, codebook_size, 6)
    brute = torch.stack([torch.cdist(heads[:, c].double(), keys[c].double()).argmin(1) for c in range(codebooks)], 1)
    assert torch.equal(nearest_keys(heads, keys), brute)


@pytest.mark.parametrize("codebook_size", [4, 100, 700])
def test_of_equally_near_keys_the_first_is_found(codebook_size):
    keys = torch.randint(3, (2, codebook_size, 2)).float()  # of nine different keys
    heads = torch.randn(40, 2, 2)
    first = [[(keys[c] == keys[c, k]).all(1).nonzero()[0].item() for c, k in enumerate(row)]
             for row in nearest_keys(heads, keys).tolist()]  # fmt: skip
    assert nearest_keys(heads, keys).tolist() == first


def test_search_is_exact_under_bf16_autocast():
    bottleneck, x = make(), torch.randn(200, 12)
    expected = bottleneck.encode(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(bottleneck.encode(x), expected)


@pytest.mark.parametrize("split", ["segment", "projection"])
def test_splits(split):
    bottleneck = make(split=split, key_dim=7 if split == "projection" else None)
    x = torch.randn(5, 2, 12)
    heads = bottleneck.heads(x)
    if split == "segment":
        assert torch.equal(heads, x.view(5, 2, 3, 4))
    else:
        assert heads.shape == (5, 2, 3, 7)
        torch.testing.assert_close(bottleneck.projection.square().sum(1), torch.ones(3, 7))
        torch.testing.assert_close(heads[1, 0, 2], x[1, 0] @ bottleneck.projection[2])


# ---- keys ----


def test_ema_converges_to_cluster_means():
    heads, means = clusters()
    bottleneck = DiscreteKeyValueBottleneck(2, 2, codebooks=1, codebook_size=4)
    bottleneck.keys.copy_(means.unsqueeze(0) + torch.randn(1, 4, 2))
    bottleneck.key_sums.copy_(bottleneck.keys)
    for _ in range(60):
        bottleneck.update_keys(heads, decay=0.7)
    torch.testing.assert_close(bottleneck.keys[0], means, atol=1e-3, rtol=0)


def test_key_norms_stay_bounded_by_the_data():
    """In the published code, keys move towards *sums*, and their norms grow with the number of assigned heads."""
    x = torch.randn(4096, 12)
    bottleneck = make()
    bottleneck.fit_keys(x, epochs=3, batch_size=512)
    longest = bottleneck.heads(x).norm(dim=-1).max()
    assert bottleneck.keys.norm(dim=-1).max() <= longest

    sums = make()
    for batch in x.split(512):  # the published code does this, and the test must detect it
        codes = sums.encode(batch)
        hits = F.one_hot(codes, 8).float()
        sums.keys.lerp_(torch.einsum("nck,ncd->ckd", hits, sums.heads(batch)), 0.8)
    assert sums.keys.norm(dim=-1).max() > longest


def test_ema_agrees_with_vector_quantize_pytorch():
    theirs = Codebook(dim=4, codebook_size=8, decay=0.8, threshold_ema_dead_code=0, eps=1e-5)
    ours = DiscreteKeyValueBottleneck(4, 2, codebooks=1, codebook_size=8)
    ours.keys.copy_(theirs.embed)
    ours.key_sums.copy_(theirs.embed_avg)
    ours.key_counts.copy_(theirs.cluster_size)
    theirs.train()
    for batch in torch.randn(20, 64, 4):
        _, codes, *_ = theirs(batch.unsqueeze(0))
        assert torch.equal(ours.encode(batch)[:, 0], codes.flatten())
        ours.update_keys(batch.unsqueeze(1), decay=0.8)
        torch.testing.assert_close(ours.keys, theirs.embed)
        torch.testing.assert_close(ours.key_counts, theirs.cluster_size)


def test_dead_keys_restart_in_all_three_buffers():
    heads, _ = clusters()
    bottleneck = DiscreteKeyValueBottleneck(2, 2, codebooks=1, codebook_size=4)
    bottleneck.keys.copy_(torch.tensor([[[10.0, 10.0], [-10.0, 10.0], [10.0, -10.0], [500.0, 500.0]]]))
    bottleneck.key_sums.copy_(bottleneck.keys)
    bottleneck.key_counts[0, 3] = 1e-6
    bottleneck.update_keys(heads, decay=0.9, expiry=0.1)
    assert bottleneck.keys[0, 3].norm() < 20  # somewhere among the data now
    torch.testing.assert_close(bottleneck.key_sums[0, 3], bottleneck.keys[0, 3] * bottleneck.key_counts[0, 3])
    assert bottleneck.key_counts[0, 3] > 1e-3
    restarted = bottleneck.keys[0, 3].clone()
    bottleneck.update_keys(heads, decay=0.9, expiry=0.1)
    assert (bottleneck.keys[0, 3] - restarted).norm() < 40  # not back to (500, 500)


def test_fitting_finds_the_clusters_and_survives_the_first_ema_step():
    heads, means = clusters(codebooks=2)
    bottleneck = DiscreteKeyValueBottleneck(4, 2, codebooks=2, codebook_size=4)
    bottleneck.fit_keys(heads.flatten(1), epochs=0, batch_size=256, seed=3)  # k-means alone
    fitted = bottleneck.keys.clone()
    bottleneck.frozen.fill_(False)
    bottleneck.update_keys(heads, decay=0.9)
    torch.testing.assert_close(bottleneck.keys, fitted, atol=0.05, rtol=0)
    # k-means may leave two clusters under one key; the fit as a whole, with its restarts, may not
    bottleneck.reset()
    bottleneck.fit_keys(heads.flatten(1), epochs=20, batch_size=100, expiry=0.2)
    for keys, order in itertools.product(bottleneck.keys, [means]):
        assert torch.cdist(order, keys).min(1).values.max() < 0.5
    statistics = bottleneck.key_statistics(heads.flatten(1))
    assert statistics["usage"] == 1.0
    assert statistics["perplexity"] == pytest.approx(4.0, abs=0.01)
    assert statistics["quantisation_error"] == pytest.approx(0.01, rel=0.2)  # the variance within a cluster


def test_statistics_by_hand():
    bottleneck = DiscreteKeyValueBottleneck(1, 2, codebooks=1, codebook_size=4)
    bottleneck.keys.copy_(torch.tensor([[[0.0], [10.0], [20.0], [30.0]]]))
    found = bottleneck.key_statistics(torch.tensor([[1.0], [1.0], [-1.0], [12.0]]))
    assert found["usage"] == 0.5
    shares = torch.tensor([0.75, 0.25])
    assert found["perplexity"] == pytest.approx((-(shares * shares.log()).sum()).exp().item())
    assert found["quantisation_error"] == pytest.approx((1 + 1 + 1 + 4) / 4)


def test_fitting_again_does_not_change_frozen_keys():
    fitted = DiscreteKeyValueBottleneck(4, 2, codebooks=2, codebook_size=3)
    fitted.fit_keys(torch.randn(50, 4))
    keys = fitted.keys.clone()
    with pytest.raises(RuntimeError, match="frozen"):
        fitted.fit_keys(torch.randn(50, 4))
    assert torch.equal(fitted.keys, keys)


def test_frozen_keys_cannot_be_fitted():
    bottleneck = make()
    bottleneck.fit_keys(torch.randn(50, 12))
    with pytest.raises(RuntimeError, match="frozen"):
        bottleneck.update_keys(torch.randn(5, 3, 4))


def test_padding_changes_neither_keys_nor_logits():
    x, mask = torch.randn(40, 6, 12), torch.ones(40, 6)
    mask[:, 4:] = 0
    padded = torch.cat([x, 100 * torch.randn(40, 3, 12)], 1)
    padded[:, 4:6] = -50.0
    padded_mask = F.pad(mask, (0, 3))
    short, long = make(), make()
    long.load_state_dict(short.state_dict())
    short.fit_keys(x, mask)
    long.fit_keys(padded, padded_mask)
    assert torch.equal(short.keys, long.keys)
    torch.testing.assert_close(short(x[:, :4], mask[:, :4]), long(padded, padded_mask))


@pytest.mark.parametrize("split", ["segment", "projection"])
def test_carried_keys_give_the_teachers_codes(split):
    teacher, student = make(split=split), make(split=split, outputs=9)
    teacher.fit_keys(torch.randn(100, 12))
    student.carry_keys(teacher)
    x = torch.randn(30, 12)
    assert student.frozen
    assert torch.equal(student.encode(x), teacher.encode(x))


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"dim": 24}, "width"),
        ({"codebook_size": 16}, "codebook_size"),
        ({"codebooks": 4}, "codebooks"),
        ({"split": "projection"}, "split"),
    ],
)
def test_carrying_keys_of_another_shape_names_the_difference(other, named):
    with pytest.raises(ValueError, match=named):
        make(**other).carry_keys(make())


# ---- values ----


@pytest.mark.parametrize("decoder", ["linear", "mean"])
@pytest.mark.parametrize("positions", [None, 5])
def test_decode_equals_a_plain_gather(decoder, positions):
    bottleneck = make(decoder=decoder)
    torch.nn.init.normal_(bottleneck.values)
    codes = torch.randint(8, (6, 3) if positions is None else (6, positions, 3))
    mask = (
        None if positions is None else (torch.rand(6, positions) > 0.4).float().index_fill(1, torch.tensor([0]), 1.0)
    )
    expected = []
    for i in range(6):
        kept = [codes[i]] if mask is None else [codes[i, p] for p in range(positions) if mask[i, p]]
        fetched = torch.stack([torch.stack([bottleneck.values[c, code[c]] for c in range(3)]) for code in kept]).mean(
            0
        )
        expected.append(fetched.mean(0) if decoder == "mean" else bottleneck.decoder(fetched.flatten()))
    torch.testing.assert_close(bottleneck.decode(codes, mask), torch.stack(expected))
    torch.testing.assert_close(bottleneck.decode(codes.to(torch.uint16), mask), torch.stack(expected))


@pytest.mark.parametrize("decoder", ["linear", "mean"])
def test_only_fetched_values_get_gradient(decoder):
    bottleneck = make(decoder=decoder)
    codes = torch.tensor([[0, 1, 2], [0, 1, 7]])
    bottleneck.decode(codes).square().sum().backward() if decoder == "linear" else F.cross_entropy(
        bottleneck.decode(codes), torch.tensor([1, 2])
    ).backward()
    touched = bottleneck.values.grad.abs().sum(-1) > 0
    expected = torch.zeros(3, 8, dtype=torch.bool)
    expected[0, 0] = expected[1, 1] = expected[2, 2] = expected[2, 7] = True
    assert torch.equal(touched, expected)


def test_training_values_leaves_the_keys_bit_identical():
    bottleneck, x, y = make(), torch.randn(64, 12), torch.randint(5, (64,))
    bottleneck.fit_keys(x)
    before = {name: buffer.clone() for name, buffer in bottleneck.named_buffers()}
    optimizer = torch.optim.AdamW(bottleneck.parameters(), lr=0.1)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(bottleneck(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(before[name], buffer) for name, buffer in bottleneck.named_buffers())


@pytest.mark.parametrize("split", ["segment", "projection"])
def test_state_dict_round_trip(split):
    bottleneck, x = make(split=split), torch.randn(20, 12)
    bottleneck.fit_keys(torch.randn(100, 12))
    other = make(split=split)
    other.load_state_dict(bottleneck.state_dict())
    assert torch.equal(other(x), bottleneck(x))
    assert other.frozen


def test_an_indivisible_width_is_an_error():
    with pytest.raises(ValueError, match=r"5 codebooks do not divide .* width 12: use one of \[1, 2, 3, 4, 6, 12\]"):
        make(codebooks=5)


EMA_ON_TWO_PROCESSES = """
import torch, torch.distributed as dist
from kd.common.bottleneck.module import DiscreteKeyValueBottleneck
dist.init_process_group("gloo")
torch.manual_seed(0)
stream = torch.randn(10, 64, 12)
def make():
    torch.manual_seed(1)
    return DiscreteKeyValueBottleneck(12, 5, codebooks=3, codebook_size=8)
def step(bottleneck, rows):
    bottleneck.update_keys(bottleneck.heads(rows), decay=0.8)
half = make()
for batch in stream:
    step(half, batch[dist.get_rank()::2])
fitted = make()
fitted.fit_keys(stream[0][dist.get_rank()::2], batch_size=16, seed=dist.get_rank())
keys = [torch.empty_like(fitted.keys) for _ in range(2)]
dist.all_gather(keys, fitted.keys)
assert torch.equal(*keys), "processes fitted different keys"
dist.destroy_process_group()
whole = make()
for batch in stream:
    step(whole, batch)
torch.testing.assert_close(half.keys, whole.keys)
torch.testing.assert_close(half.key_counts, whole.key_counts)
"""


@pytest.mark.slow
def test_two_processes_fit_the_keys_of_one(tmp_path):
    script = tmp_path / "ema.py"
    script.write_text(EMA_ON_TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
