"""Sparse forms of a teacher's distributions, and the folder that stores them."""

import pytest
import torch
from torch import Tensor

from kd.common.losses import soft_target_kl
from kd.common.utils.errors import UserError
from kd.nlp.student_model.sparse_logits import Form, Sample, Top, form_of, spec_of

VOCABULARY = 12


def columns_of(form: Form, logits: Tensor, temperature: float, sample_id: int = 0) -> dict[str, Tensor]:
    found = form.compress(logits, temperature, sample_id)
    return found | {"tokens": found["tokens"].long()}


def loss_of(form: Form, student: Tensor, teacher: Tensor, temperature: float, sample_id: int = 0) -> Tensor:
    return form.loss(student, columns_of(form, teacher, temperature, sample_id), temperature)


def estimates(form: Sample, logits: Tensor, draws: int) -> Tensor:
    """(draws, labels, vocabulary): the estimated probabilities of each draw."""
    columns = columns_of(form, logits.repeat(draws, 1), 1.0)
    found = torch.zeros(draws * len(logits), logits.shape[1])
    labels = torch.arange(len(found)).repeat_interleave(columns["sizes"].long())
    found[labels, columns["tokens"]] = columns["weights"].float() / form.k
    return found.view(draws, *logits.shape)


def both_logits() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(4, VOCABULARY), 2 * torch.randn(4, VOCABULARY)


SAMPLES = [
    Sample(k=5),
    Sample(k=5, stratified=False),
    Sample(k=3, exponent=0.7),
    Sample(k=6, exponent=1.2, stratified=False),
]


@pytest.mark.parametrize("form", SAMPLES, ids=spec_of)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_expectations_of_loss_and_gradient_are_those_of_the_dense_divergence(form, temperature):
    """Within 5 standard errors of the means of 100 groups of 40 draws, in each of 48 coordinates."""
    student, teacher = both_logits()
    student.requires_grad_()
    dense = soft_target_kl(student, teacher, temperature)
    (expected,) = torch.autograd.grad(dense, student)
    gradients, losses = [], []
    for group in range(100):
        loss = loss_of(form, student.repeat(40, 1), teacher.repeat(40, 1), temperature, group)
        gradients.append(torch.autograd.grad(loss, student)[0])
        losses.append(loss.detach())
    for values, wanted in ((torch.stack(gradients), expected), (torch.stack(losses), dense.detach())):
        error = values.std(0) / len(values) ** 0.5
        assert ((values.mean(0) - wanted).abs() <= 5 * error + 5e-4 * wanted.abs() + 1e-6).all()
        assert error.max() < 0.02 * wanted.abs().max()  # so the test detects a bias of a tenth


@pytest.mark.parametrize("exponent", [1.0, 0.7])
def test_stratified_draws_vary_less_than_independent_ones(exponent):
    _, teacher = both_logits()
    variances = [
        estimates(Sample(k=5, exponent=exponent, stratified=stratified), teacher, 500).var(0).sum()
        for stratified in (True, False)
    ]
    assert variances[0] < 0.7 * variances[1]


def test_independent_counts_have_the_variance_of_a_multinomial():
    _, teacher = both_logits()
    p = teacher.softmax(-1)
    found = estimates(Sample(k=5, stratified=False), teacher, 2000).var(0)
    torch.testing.assert_close(found, p * (1 - p) / 5, rtol=0.25, atol=2e-3)


def test_weights_of_a_sample_are_its_counts():
    _, teacher = both_logits()
    columns = columns_of(Sample(k=7), teacher, 1.0)
    weights = columns["weights"].split(columns["sizes"].tolist())
    assert [row.sum().item() for row in weights] == [7.0] * 4
    assert all((row == row.round()).all() and (row > 0).all() for row in weights)


def test_draws_depend_on_seed_and_sample_id_alone():
    _, teacher = both_logits()
    form = Sample(k=5)
    first = columns_of(form, teacher, 1.0, 3)
    assert all(torch.equal(first[name], column) for name, column in columns_of(form, teacher, 1.0, 3).items())
    assert not torch.equal(first["tokens"], columns_of(form, teacher, 1.0, 4)["tokens"])
    assert not torch.equal(first["tokens"], columns_of(Sample(k=5, seed=1), teacher, 1.0, 3)["tokens"])


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_whole_vocabulary_is_the_dense_divergence(temperature):
    """Within the rounding of fp16. With 2,000 draws, a sample nearly is."""
    student, teacher = both_logits()
    student.requires_grad_()
    dense = soft_target_kl(student, teacher, temperature)
    (expected,) = torch.autograd.grad(dense, student)
    for form, tolerance in ((Top(k=VOCABULARY), 1e-3), (Sample(k=2000), 2e-2)):
        loss = loss_of(form, student, teacher, temperature)
        torch.testing.assert_close(loss, dense, rtol=tolerance, atol=tolerance)
        (gradient,) = torch.autograd.grad(loss, student)
        torch.testing.assert_close(gradient, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def test_the_most_probable_tokens_and_the_mass_of_the_rest_by_hand():
    teacher = torch.tensor([[0.5, 0.1, 0.3, 0.1]]).log()
    columns = columns_of(Top(k=2), teacher, 1.0)
    assert columns["tokens"].tolist() == [[0, 2]]
    torch.testing.assert_close(columns["probabilities"].float(), torch.tensor([[0.5, 0.3, 0.2]]), rtol=1e-3, atol=0)
    assert columns_of(Top(k=4), teacher, 1.0)["probabilities"][0, 4] == 0


def test_large_vocabularies_are_computed_in_parts(monkeypatch):
    from kd.nlp.student_model import sparse_logits

    _, teacher = both_logits()
    whole = [columns_of(form, teacher, 2.0) for form in (Top(k=3), Sample(k=5))]
    monkeypatch.setattr(sparse_logits, "AT_ONCE", 3 * VOCABULARY)
    monkeypatch.setattr(sparse_logits, "SMALL", VOCABULARY - 1)
    for form, expected in zip((Top(k=3), Sample(k=5)), whole, strict=True):
        found = form.compress(teacher, 2.0, 0)
        assert found["tokens"].dtype == torch.int32
        assert all(torch.equal(found[name].to(column.dtype), column) for name, column in expected.items())


def test_a_row_without_labels_has_empty_columns():
    for form in (Top(k=3), Sample(k=5)):
        assert all(len(column) == 0 for column in form.compress(torch.zeros(0, VOCABULARY), 1.0, 0).values())


def test_forms_by_name():
    assert form_of("top") == Top(k=64) and form_of("sample:k=8:seed=3") == Sample(k=8, seed=3)
    assert form_of(spec_of(Sample(k=9, stratified=False))) == Sample(k=9, stratified=False)
    for spec in ("top:k=0", "sample:k=3000", "sample:exponent=0", "bottom", "top:seed=1"):
        with pytest.raises(UserError):
            form_of(spec)
