"""Contrastive representation distillation: its loss against numpy, negatives, memory banks, and resuming."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kd.common.methods import Feature, Method
from kd.common.outputs import Outputs
from kd.common.training.side_by_side import SideBySide, SideBySideObjective
from kd.common.utils.errors import UserError
from kd.image_classification.student_model.methods import METHODS
from kd.image_classification.student_model.methods.last_map import Contrast, remember
from kd.image_classification.teacher_model.classifier import new_classifier
from kd_testing.image_pairs import Pair, noise
from kd_testing.image_training import train
from kd_testing.paths import REPO

LABELS = torch.tensor([0, 0, 1, 1, 2, 2])


def contrast(labels: Tensor = LABELS, negatives: int = 100, seed: int = 0) -> Contrast:
    """A term for features of 4 and 5 channels, embedded in 3 dimensions."""
    torch.manual_seed(seed)
    return Contrast(Feature("map", 4), Feature("map", 5), labels, negatives, 3, temperature=0.5, momentum=0.25)


def outputs_of(ids: list[int], seed: int = 0) -> tuple[Outputs, Outputs]:
    generator = torch.Generator().manual_seed(seed)
    pred, target = (torch.randn(len(ids), width, 1, 1, generator=generator) for width in (4, 5))
    return Outputs(features={"map": pred}, sample_id=torch.tensor(ids)), Outputs(features={"map": target})


def array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy().copy()


def units(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def embeddings(term: Contrast, student: Outputs, teacher: Outputs) -> tuple[np.ndarray, np.ndarray]:
    def of(linear: nn.Linear, outputs: Outputs) -> np.ndarray:
        assert outputs.features
        return units(array(outputs.features["map"][:, :, 0, 0]) @ array(linear.weight).T + array(linear.bias))

    return of(term.student_embedding, student), of(term.teacher_embedding, teacher)


def expected_direction(pred: np.ndarray, memory: np.ndarray, ids: list[int], z: float | None = None):
    """The loss of one network's embeddings with all images of other classes, by the paper's formula, and Z."""
    scores = np.exp(pred @ memory.T / 0.5)  # (batch, samples)
    rows = [[i, *np.flatnonzero(LABELS.numpy() != LABELS[i].item())] for i in ids]
    chosen = np.array([scores[k, row] for k, row in enumerate(rows)])  # the positive first
    z = chosen.mean() * len(memory) if z is None else z
    p, c = chosen / z, 4 / 6
    return (-np.log(p[:, 0] / (p[:, 0] + c)) - np.log(c / (p[:, 1:] + c)).sum(1)).mean(), z


# ---- the loss, by numpy ----


def test_the_loss_and_the_constant_z_of_the_first_batch():
    term = contrast()
    constants: list[float | None] = [None, None]
    for step, ids in enumerate([[0, 3], [1, 5], [3, 2]]):
        student, teacher = outputs_of(ids, seed=step)
        pred, target = embeddings(term, student, teacher)
        first, constants[0] = expected_direction(pred, array(term.teacher_memory), ids, constants[0])
        second, constants[1] = expected_direction(target, array(term.student_memory), ids, constants[1])
        assert term(student, teacher, None).item() == pytest.approx(first + second, rel=1e-5)
    np.testing.assert_allclose(term.log_z.exp().numpy(), constants, rtol=1e-5)


def test_gradients_reach_embeddings_and_student_but_no_memory():
    term = contrast()
    student, teacher = outputs_of([0, 3])
    student.features["map"].requires_grad_()
    term(student, teacher, None).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in term.parameters())
    assert student.features["map"].grad.abs().sum() > 0
    assert {name for name, _ in term.named_parameters()} == {
        f"{role}_embedding.{part}" for role in ("student", "teacher") for part in ("weight", "bias")
    }


# ---- negatives ----


def test_negatives_are_of_other_classes_without_repetition():
    labels = torch.randint(4, (60,), generator=torch.Generator().manual_seed(1))
    term, ids = contrast(labels, negatives=20), torch.arange(60)
    seen: dict[int, set[int]] = {i: set() for i in range(60)}
    for _ in range(20):
        drawn = term.draw_negatives(ids)
        assert drawn.shape == (60, 20)
        assert (labels[drawn] != labels[:, None]).all()
        for i, row in enumerate(drawn.tolist()):
            assert len(set(row)) == 20
            seen[i] |= set(row)
    for i, found in seen.items():
        assert found == set(torch.nonzero(labels != labels[i]).flatten().tolist()), "each of them is drawn"


def test_the_largest_class_bounds_the_number_of_negatives():
    labels = torch.tensor([0, 0, 0, 0, 0, 1, 2])
    drawn = contrast(labels, negatives=100).draw_negatives(torch.tensor([0, 5]))
    assert drawn.shape == (2, 2)
    assert sorted(drawn[0].tolist()) == [5, 6] and 5 not in drawn[1]


def test_draws_depend_on_their_number_and_not_on_the_global_generator():
    labels, ids = torch.arange(200) % 10, torch.tensor([3, 50])
    first, same, other = (contrast(labels, 20, seed) for seed in (0, 0, 1))
    before = torch.get_rng_state()
    draws = [first.draw_negatives(ids) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.randn(7)
    assert torch.equal(same.draw_negatives(ids), draws[0]) and torch.equal(same.draw_negatives(ids), draws[1])
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(other.draw_negatives(ids), draws[0])


# ---- memory banks ----


def test_memories_are_moving_averages_of_unit_length():
    term = contrast()
    ids = [4, 1]
    for step in range(3):
        student, teacher = outputs_of(ids, seed=step)
        before = array(term.student_memory), array(term.teacher_memory)
        now = embeddings(term, student, teacher)
        term(student, teacher, None)
        for old, new, memory in zip(before, now, (term.student_memory, term.teacher_memory), strict=True):
            expected = old.copy()
            expected[ids] = units(0.25 * old[ids] + 0.75 * new)
            np.testing.assert_allclose(memory.numpy(), expected, rtol=0, atol=1e-6)
            np.testing.assert_allclose(np.linalg.norm(memory.numpy(), axis=1), 1, atol=1e-6)


def test_the_first_view_of_a_repeated_image_is_stored():
    memory = torch.eye(3)
    views = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    remember(memory, torch.tensor([0, 2, 0]), views, momentum=0.0)
    assert torch.equal(memory, torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))


def test_the_next_loss_is_the_same_after_saving_and_loading(tmp_path):
    labels = torch.arange(200) % 10
    term, loaded, without = contrast(labels, 20), contrast(labels, 20, seed=1), contrast(labels, 20, seed=1)
    for step in range(3):
        term(*outputs_of([5, 17, 120], seed=step), None)
    loaded.load_state_dict(term.state_dict())
    for step in range(3, 6):
        batch = outputs_of([5, 60, 199], seed=step)
        value = term(*batch, None).item()
        assert loaded(*batch, None).item() == value
        assert without(*batch, None).item() != value
    assert "labels" not in term.state_dict(), "the data have them"


# ---- in training ----


def new_pair(seed: int = 0) -> Pair:
    torch.manual_seed(seed)
    data = noise()
    return Pair(new_classifier("resnet8", data.config), new_classifier("resnet8", data.config), data)


def crd(pair: Pair, seed: int = 0) -> Method:
    """Uses fewer negatives than exist, so that the draw has an effect."""
    torch.manual_seed(seed)
    return METHODS["crd"](pair.spec, negatives=10, width=16)


def test_a_resumed_training_gives_the_same_student_and_memories(tmp_path):
    """Step 7 is within an epoch of five steps."""
    settings = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 7, "save_total_limit": 9}
    pair = new_pair()
    whole = crd(pair)
    train(tmp_path, pair, whole, **settings)
    checkpoint = tmp_path / "checkpoint-7"
    kept = load_file(checkpoint / "objective.safetensors")
    assert kept["modules_of_terms.contrast.teacher_memory"].shape == (40, 16)
    assert not any("contrast" in name or "memory" in name for name in load_file(checkpoint / "model.safetensors"))
    again = new_pair()
    torch.manual_seed(5)
    student = new_classifier("resnet8", again.data.config)
    resumed = crd(again, seed=6)
    train(tmp_path, again, resumed, student, resume=str(checkpoint), **settings)
    for name, weight in pair.student.state_dict().items():
        assert torch.equal(student.state_dict()[name], weight), name
    for name, value in whole.objective.state_dict().items():
        assert torch.equal(resumed.objective.state_dict()[name], value), name


def test_students_side_by_side_equal_students_trained_alone(tmp_path):
    settings = {"num_train_epochs": 2, "max_grad_norm": 0.0}
    alone = {}
    for seed in (1, 2):
        pair = new_pair(seed)
        pair.teacher.load_state_dict(new_pair().teacher.state_dict())
        alone[str(seed)] = pair.student, crd(pair, seed)
        train(tmp_path / str(seed), pair, alone[str(seed)][1], **settings)
    together = {str(seed): new_pair(seed).student for seed in (1, 2)}
    pair = new_pair()
    methods = {name: crd(Pair(student, pair.teacher, pair.data), int(name)) for name, student in together.items()}
    objective = SideBySideObjective({name: method.objective for name, method in methods.items()})
    all_of_them = SimpleNamespace(
        objective=objective,
        features=SideBySide.paths({name: method.features for name, method in methods.items()}),
        teacher_features=methods["1"].teacher_features,
    )
    train(tmp_path / "together", pair, all_of_them, SideBySide(together), **settings)
    for name, (student, method) in alone.items():
        for key, weight in student.state_dict().items():
            torch.testing.assert_close(together[name].state_dict()[key], weight, msg=f"{name} {key}")
        term = objective.objectives[name].terms["contrast"]
        assert term.draw == method.objective.terms["contrast"].draw
        torch.testing.assert_close(term.student_memory, method.objective.terms["contrast"].student_memory)


TWO_PROCESSES = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import kd.common
from test_contrastive import crd, new_pair
from kd_testing.image_training import train
from kd.common.utils.devices import end_processes, process
pair = new_pair()
method = crd(pair)
trainer = train(sys.argv[2], pair, method, per_device_train_batch_size=4, num_train_epochs=2)
term = method.objective.terms["contrast"]
torch.save(term.state_dict(), sys.argv[2] + f"/{process()[0]}.pt")
end_processes()
"""


@pytest.mark.slow
def test_two_processes_store_the_same_memories(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n" + TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run([*command, str(REPO / "tests"), str(tmp_path)], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-6000:]
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    start = crd(new_pair()).objective.terms["contrast"]
    for name in ("student_memory", "teacher_memory"):
        torch.testing.assert_close(one[name], two[name])
        assert (one[name] != start.state_dict()[name]).any(1).all(), "each process stores the embeddings of both"


# ---- errors ----


def test_one_class_and_missing_sample_ids_are_errors():
    with pytest.raises(UserError, match="at least 2 classes"):
        contrast(torch.zeros(6, dtype=torch.long))
    student, teacher = outputs_of([0, 1])
    student.sample_id = None
    with pytest.raises(ValueError, match="sample_id"):
        contrast()(student, teacher, None)
