"""Counted values: by hand, against scikit-learn's naive Bayes, and examples that are forgotten exactly."""

from types import SimpleNamespace

import pytest
import torch
from sklearn.naive_bayes import CategoricalNB

from kd.common.bottleneck.changes import SavedStudent, add_examples
from kd.common.bottleneck.counts import count_labels
from kd.common.bottleneck.module import DiscreteKeyValueBottleneck
from kd.common.bottleneck.training import CodeDataset, add_samples

CLASSES, SIZE, CODEBOOKS = 5, 8, 3


def counted(**others: object) -> DiscreteKeyValueBottleneck:
    shape = {"codebooks": CODEBOOKS, "codebook_size": SIZE, "decoder": "mean", "values": "counted", **others}
    return DiscreteKeyValueBottleneck(12, CLASSES, **shape)  # type: ignore[arg-type]


def examples(rows: int, seed: int = 0, positions: tuple[int, ...] = ()) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes that depend on the label, and labels. Every class occurs."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % CLASSES
    noise = torch.randint(4, (rows, *positions, CODEBOOKS), generator=generator)
    return (noise + labels.view(-1, *([1] * noise.dim())[1:])) % SIZE, labels


def test_counts_by_hand():
    like = torch.zeros(2, 3, 2, dtype=torch.int32)
    found = count_labels(torch.tensor([[0, 2], [0, 1], [1, 2]]), torch.tensor([1, 1, 0]), like)
    expected = torch.zeros_like(like)
    expected[0, 0, 1], expected[0, 1, 0], expected[1, 2, 1], expected[1, 1, 1], expected[1, 2, 0] = 2, 1, 1, 1, 1
    assert torch.equal(found, expected)
    positions, mask = torch.tensor([[[0, 2], [1, 0], [2, 2]]]), torch.tensor([[1, 1, 0]])
    found = count_labels(positions.to(torch.uint16), torch.tensor([1]), like, mask)
    assert found[..., 1].tolist() == [[1, 1, 0], [1, 0, 1]] and not found[..., 0].any()


def test_predictions_are_those_of_naive_bayes():
    (codes, labels), (others, _) = examples(200), examples(50, seed=1)
    bottleneck = counted()
    bottleneck.add(codes, labels)
    alpha = (200 / CLASSES) ** 0.5 / SIZE
    theirs = CategoricalNB(alpha=alpha, fit_prior=False, min_categories=SIZE).fit(codes.numpy(), labels.numpy())
    expected = torch.from_numpy(theirs.predict_joint_log_proba(others.numpy())).float()
    expected = (expected + torch.log(torch.tensor(float(CLASSES)))) / CODEBOOKS**0.5
    torch.testing.assert_close(bottleneck.decode(others), expected)


@pytest.mark.parametrize("positions", [(), (4,)])
def test_forgotten_examples_leave_no_trace(positions):
    codes, labels = examples(100, positions=positions)
    mask = (torch.rand(100, *positions) > 0.3) if positions else None
    forgotten = torch.arange(100) % 7 == 0
    rest = ~forgotten

    def part(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return codes[rows], labels[rows], *(() if mask is None else (mask[rows],))

    retrained, bottleneck = counted(), counted()
    retrained.add(*part(rest))
    for rows in torch.randperm(100).split(9):
        bottleneck.add(*part(rows))
    assert not torch.equal(bottleneck.decode(codes), retrained.decode(codes))
    bottleneck.forget(*part(forgotten))
    for name in ("label_counts", "values"):
        assert torch.equal(bottleneck.state_dict()[name], retrained.state_dict()[name])
    assert torch.equal(bottleneck.decode(codes), retrained.decode(codes))
    bottleneck.add(*part(forgotten))
    everything = counted()
    everything.add(*part(torch.ones(100, dtype=torch.bool)))
    assert torch.equal(bottleneck.values, everything.values)


def test_examples_that_were_never_added_cannot_be_forgotten():
    codes, labels = examples(20)
    bottleneck = counted()
    bottleneck.add(codes[:10], labels[:10])
    before = bottleneck.values.clone()
    with pytest.raises(ValueError, match="never added"):
        bottleneck.forget(codes[:11], labels[:11])
    with pytest.raises(ValueError, match="never added"):
        bottleneck.forget(codes[:10], (labels[:10] + 1) % CLASSES)
    assert torch.equal(bottleneck.values, before)


def test_adding_examples_changes_only_the_values_of_their_class():
    codes, labels = examples(60)
    bottleneck = counted()
    bottleneck.add(codes, labels)
    before = bottleneck.values.clone()
    bottleneck.add(codes[labels == 2][:1], torch.tensor([2]))
    changed = (bottleneck.values != before).any(0).any(0)
    assert changed.tolist() == [label == 2 for label in range(CLASSES)]


def test_a_class_is_added_from_one_example():
    codes, labels = examples(60)
    known = labels != 4
    bottleneck = DiscreteKeyValueBottleneck(12, 4, CODEBOOKS, SIZE, decoder="mean", values="counted")
    bottleneck.add(codes[known], labels[known])
    before = bottleneck.decode(codes)
    bottleneck.add_classes(1)
    assert torch.equal(bottleneck.decode(codes)[:, :4], before)
    assert (bottleneck.decode(codes).argmax(1) < 4).all()
    bottleneck.add(codes[~known][:1], labels[~known][:1])
    assert torch.equal(bottleneck.decode(codes)[:, :4], before)
    assert bottleneck.decode(codes[~known][:1]).argmax() == 4
    whole = counted()
    whole.add(codes[known], labels[known])
    whole.add(codes[~known][:1], labels[~known][:1])
    assert torch.equal(whole.values, bottleneck.values)


def test_forgetting_a_class_forgets_its_examples():
    codes, labels = examples(100)
    bottleneck, retrained = counted(), counted()
    bottleneck.add(codes, labels)
    others = [label for label in range(CLASSES) if label != 2]
    before = bottleneck.values[..., others].clone()
    retrained.add(codes[labels != 2], labels[labels != 2])
    bottleneck.forget_class(2)
    assert torch.equal(bottleneck.values, retrained.values)
    assert torch.equal(bottleneck.values[..., others], before)
    assert not (bottleneck.decode(torch.randint(SIZE, (500, CODEBOOKS))).argmax(1) == 2).any()
    bottleneck.add(codes[labels == 2], labels[labels == 2])  # a forgotten class can be added again
    assert (bottleneck.decode(codes[labels == 2]).argmax(1) == 2).float().mean() > 0.5


@pytest.mark.parametrize("decoder", ["linear", "mean"])
def test_trained_values_never_predict_a_forgotten_class(decoder):
    bottleneck = DiscreteKeyValueBottleneck(12, CLASSES, codebooks=3, codebook_size=SIZE, decoder=decoder)
    torch.nn.init.normal_(bottleneck.values)
    codes = torch.randint(SIZE, (500, 3))
    before = bottleneck.decode(codes)
    assert (before.argmax(1) == 2).any()
    bottleneck.forget_class(2)
    after = bottleneck.decode(codes)
    others = [label for label in range(CLASSES) if label != 2]
    assert not (after.argmax(1) == 2).any()
    assert torch.equal(after[:, others], before[:, others])
    assert torch.isfinite(after).all()
    with pytest.raises(ValueError, match="only counted values"):
        bottleneck.forget(codes, torch.zeros(500))


def test_a_saved_bottleneck_still_forgets():
    codes, labels = examples(50)
    bottleneck, other, retrained = counted(), counted(), counted()
    bottleneck.add(codes, labels)
    other.load_state_dict(bottleneck.state_dict())
    assert torch.equal(other.decode(codes), bottleneck.decode(codes))
    other.forget(codes[:5], labels[:5])
    retrained.add(codes[5:], labels[5:])
    assert torch.equal(other.values, retrained.values)


def test_cached_codes_are_added_in_batches():
    codes, labels = examples(30)
    bottleneck, other = counted(), counted()
    add_samples(bottleneck, CodeDataset(list(codes.to(torch.uint16)), labels, torch.arange(30)), batch_size=7)
    other.add(codes, labels)
    assert torch.equal(bottleneck.values, other.values)
    ragged = [row.repeat(2 + i % 3, 1).to(torch.uint16) for i, row in enumerate(codes)]
    add_samples(bottleneck, CodeDataset(ragged, labels, torch.arange(30)), batch_size=7)
    assert bottleneck.label_counts.sum() == CODEBOOKS * (30 + sum(map(len, ragged)))


def test_added_samples_of_a_new_class_are_counted_without_their_padding():
    codes, labels = examples(6)
    ragged = [row.repeat(1 + i % 3, 1).to(torch.uint16) for i, row in enumerate(codes)]
    model = torch.nn.Module()
    model.bottleneck = bottleneck = counted()
    model.config = SimpleNamespace(id2label=dict(enumerate("abcde")))
    samples = CodeDataset(ragged, torch.tensor([0, 0, 0, 1, 1, 1]), torch.arange(6))
    add_examples(SavedStudent("student", model, None), samples, ["new", "a"])
    assert list(model.config.id2label.values()) == [*"abcde", "new"] and model.config.label2id["new"] == 5
    assert bottleneck.label_counts is not None
    per_class = bottleneck.label_counts.sum((0, 1)) // CODEBOOKS
    assert per_class.tolist() == [6, 0, 0, 0, 0, 6], "1 + 2 + 3 positions of three samples each"


def test_counted_values_are_not_trained():
    bottleneck = counted()
    assert bottleneck.parameter_groups() == {}
    assert not any(parameter.requires_grad for parameter in bottleneck.parameters())


@pytest.mark.parametrize("others", [{"decoder": "linear"}, {"num_outputs": 1}])
def test_counted_values_need_classes_and_the_mean_decoder(others):
    shape = {"num_outputs": CLASSES, "decoder": "mean", "values": "counted", **others}
    with pytest.raises(ValueError, match="--decoder mean"):
        DiscreteKeyValueBottleneck(12, codebooks=3, codebook_size=SIZE, **shape)


@pytest.mark.parametrize(
    ("codes", "label", "message"),
    [([[0, 0, SIZE]], 0, "codes must be"), ([[0, 0, 0]], CLASSES, "labels must be"), ([[0, 0]], 0, "2 codebooks")],
)
def test_codes_and_labels_out_of_range(codes, label, message):
    with pytest.raises(ValueError, match=message):
        counted().add(torch.tensor(codes), torch.tensor([label]))
