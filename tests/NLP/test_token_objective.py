"""The objective over tokens: its means, and its values, gradients and memory in chunks of positions."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from kd.common import token_terms
from kd.common.objective import Objective
from kd.common.outputs import Outputs
from kd.common.token_terms import all_tokens, divergence_term, label_term, per_sequence, per_token
from kd.common.utils.errors import UserError
from kd.common.utils.tasks import IGNORED
from kd.nlp.student_model.token_objective import DIVERGENCES, divergence_of, parts_of, token_level
from kd.nlp.teacher_model.generative import random_gpt2

VOCABULARY = 11
Total = Callable[[Tensor], Tensor]


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (3, 5, vocabulary) of student and teacher, and labels for 5, 2 and 0 of the positions."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(3, 5, VOCABULARY, generator=generator) for _ in range(2))
    labels = torch.randint(0, VOCABULARY, (3, 5), generator=generator)
    labels[1, 2:] = labels[2] = IGNORED
    return student.to(dtype).requires_grad_(), teacher.to(dtype), labels


def value_and_gradient(objective: Objective, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    student, teacher, labels = batch(dtype)
    parts = objective(Outputs(logits=student), Outputs(logits=teacher), labels)
    (gradient,) = torch.autograd.grad(sum(parts.values()), student)
    return parts, gradient


# ---- chunks ----


@pytest.mark.parametrize("weights", [per_token, per_sequence])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [*DIVERGENCES, "abkd:alpha=1:beta=0", "abkd:alpha=0.2:beta=0.7"])
def test_chunks_have_the_values_and_the_gradient_of_all_positions_at_once(monkeypatch, kind, dtype, weights):
    objective = token_level(0.3, divergence_of(kind, 2.0), 0.1, weights).objective
    expected, dense = value_and_gradient(objective, dtype)
    for chunk in (1, 2 * VOCABULARY, 3 * VOCABULARY + 1):
        monkeypatch.setattr(token_terms, "CHUNK", chunk)
        parts, gradient = value_and_gradient(objective, dtype)
        torch.testing.assert_close(parts, expected)
        torch.testing.assert_close(gradient, dense)
        assert gradient.dtype == dtype and not gradient[1, 2:].any() and not gradient[2].any()


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_the_gradient_in_chunks_is_the_slope(monkeypatch, kind):
    monkeypatch.setattr(token_terms, "CHUNK", 2 * VOCABULARY)
    student, teacher, labels = batch()
    objective = token_level(0.3, divergence_of(kind, 2.0)).objective
    direction, step = torch.randn(student.shape), 1e-2

    def total(logits: Tensor) -> Tensor:
        return sum(objective(Outputs(logits=logits), Outputs(logits=teacher), labels).values())

    (gradient,) = torch.autograd.grad(total(student), student)
    slope = (total(student + step * direction) - total(student - step * direction)) / (2 * step)
    assert slope.item() == pytest.approx((gradient * direction).sum().item(), rel=2e-2, abs=1e-3)


def test_each_term_has_its_own_weight_in_the_gradient(monkeypatch):
    """The gradient of two terms, which is computed once, is the weighted sum of the gradients of each."""
    monkeypatch.setattr(token_terms, "CHUNK", 2 * VOCABULARY)
    student, teacher, labels = batch()
    outputs = Outputs(logits=student), Outputs(logits=teacher), labels
    terms = label_term(), divergence_term(DIVERGENCES["js"])
    both = Objective(task=(2.0, terms[0]), tokens=(5.0, terms[1]))(*outputs)
    (found,) = torch.autograd.grad(both["task"] + 3 * both["tokens"], student)
    alone = [torch.autograd.grad(term(*outputs), student)[0] for term in terms]
    torch.testing.assert_close(found, 2 * alone[0] + 15 * alone[1])


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_chunks_keep_nothing_but_the_logits_for_backward(monkeypatch, kind):
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    sizes = []
    for chunk in (token_terms.CHUNK, 2 * 1000):
        monkeypatch.setattr(token_terms, "CHUNK", chunk)
        kept.clear()
        student, teacher = torch.randn(2, 20, 1000, requires_grad=True), torch.randn(2, 20, 1000)
        outputs = Outputs(logits=student), Outputs(logits=teacher), torch.randint(0, 1000, (2, 20))
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            parts = token_level(0.5, divergence_of(kind, 2.0)).objective(*outputs)
        logits = student.untyped_storage().nbytes()
        sizes.append(sum(kept.values()) / logits)
        sum(parts.values()).backward()
    assert sizes[0] > 3  # at once
    assert sizes[1] < 1.01


def test_a_model_has_the_same_gradients_in_chunks(monkeypatch):
    teacher = random_gpt2(50, 0, layers=1, width=32, positions=8, dropout=0.0)
    objective, ids = token_level(0.5, divergence_of("reverse_kl", 2.0)).objective, torch.randint(1, 50, (3, 8))
    gradients = []
    for chunk in (token_terms.CHUNK, 100):
        monkeypatch.setattr(token_terms, "CHUNK", chunk)
        torch.manual_seed(0)
        student = random_gpt2(50, 0, layers=1, width=32, positions=8, dropout=0.0)
        with torch.no_grad():
            targets = Outputs(logits=teacher(ids).logits)
        sum(objective(Outputs(logits=student(ids).logits), targets, ids.roll(-1, 1)).values()).backward()
        gradients.append({name: weight.grad for name, weight in student.named_parameters()})
    torch.testing.assert_close(*gradients)


# ---- means ----


@pytest.mark.parametrize("chunk", [1, 2**22])
def test_means_by_hand(monkeypatch, chunk):
    monkeypatch.setattr(token_terms, "CHUNK", chunk)
    student, teacher, labels = batch()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    outputs = Outputs(logits=student, mask=mask), Outputs(logits=teacher), labels
    each = F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="none").sum(-1)
    divergence = divergence_of("kd", 1.0)
    means = {
        per_token: (each[0].sum() + each[1, :2].sum()) / 7,
        per_sequence: (each[0].mean() + each[1, :2].mean()) / 2,
        all_tokens: (each[0].sum() + each[1, :3].sum()) / 8,
    }
    for weights, expected in means.items():
        torch.testing.assert_close(divergence_term(divergence, weights)(*outputs), expected)
    outputs[0].mask = None
    torch.testing.assert_close(divergence_term(divergence, all_tokens)(*outputs), each.mean())


@pytest.mark.parametrize("weights", [per_token, per_sequence])
def test_a_batch_without_labels_has_no_loss_and_no_gradient(weights):
    student, teacher, labels = batch()
    outputs = Outputs(logits=student), Outputs(logits=teacher), torch.full_like(labels, IGNORED)
    parts = token_level(0.5, divergence_of("js", 2.0), weights=weights).objective(*outputs)
    total = sum(parts.values())
    total.backward()
    assert total == 0 and not student.grad.any()


def test_missing_logits_are_an_error():
    student, _, labels = batch()
    with pytest.raises(UserError, match="needs teacher logits"):
        divergence_term(DIVERGENCES["kd"])(Outputs(logits=student), None, labels)


# ---- methods ----


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("kd", (False, "kd")),
        ("sequence_kd", (True, None)),
        ("sequence_kd+js:beta=0.1", (True, "js:beta=0.1")),
        ("kd+sequence_kd", (False, "kd+sequence_kd")),  # refused by divergence_of
    ],
)
def test_parts_of_a_method_of_translators(method, expected):
    assert parts_of(method) == expected


# ---- TRL ----


def generalized_jsd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """The formula that TRL documents for its GKDTrainer, from probabilities, in fp64: (..., vocabulary) -> (...)."""
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    if beta in (0, 1):
        p, q = (p, q) if beta == 0 else (q, p)
        return (p * (p / q).log()).sum(-1)
    m = beta * p + (1 - beta) * q
    return beta * (p * (p / m).log()).sum(-1) + (1 - beta) * (q * (q / m).log()).sum(-1)


BETAS = {0: "kd", 0.1: "js:beta=0.1", 0.5: "js", 0.9: "js:beta=0.9", 1: "reverse_kl"}


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", BETAS)
def test_values_of_the_formula_of_gkd(beta, temperature):
    """GKD has no factor T^2."""
    student, teacher, labels = batch()
    found = divergence_term(divergence_of(BETAS[beta], temperature))(
        Outputs(logits=student), Outputs(logits=teacher), labels
    )
    each = generalized_jsd(student / temperature, teacher / temperature, beta)
    assert found.item() == pytest.approx(temperature**2 * each[labels != IGNORED].mean().item(), rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", BETAS)
def test_values_and_gradients_of_trl(beta, temperature):
    gkd = pytest.importorskip("trl.experimental.gkd", reason="trl is not installed: pip install trl")
    student, teacher, labels = batch()
    found = divergence_term(divergence_of(BETAS[beta], temperature))(
        Outputs(logits=student), Outputs(logits=teacher), labels
    )
    loss = gkd.GKDTrainer.generalized_jsd_loss(student, teacher, labels, beta, temperature)
    expected = temperature**2 * loss
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(value, student)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients)
