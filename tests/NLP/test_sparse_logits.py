"""Sparse forms of a teacher's distributions, and the folder that stores them."""

import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor

from kd.common.losses import soft_target_kl
from kd.common.outputs import Outputs
from kd.common.training import teacher_outputs
from kd.common.utils.errors import UserError
from kd.common.utils.tasks import IGNORED
from kd.nlp.data.corpora import stack
from kd.nlp.student_model import sparse_logits, teacher_logits
from kd.nlp.student_model.sparse_logits import Form, Sample, Top, form_of, joined, spec_of
from kd.nlp.student_model.teacher_logits import LogitStore, StoredLogits, with_sample_ids
from kd.nlp.student_model.token_objective import TOKENS, divergence_of, token_level
from kd.nlp.teacher_model.generative import byte_level_bpe, random_gpt2

VOCABULARY = 12
WHOLE = Top(k=VOCABULARY)


def columns_of(form: Form, logits: Tensor, temperature: float, sample_id: int = 0) -> dict[str, Tensor]:
    found = form.compress(logits, temperature, sample_id)
    return found | {"tokens": found["tokens"].long()}


def loss_of(form: Form, student: Tensor, teacher: Tensor, temperature: float, sample_id: int = 0) -> Tensor:
    rows = form.rows(columns_of(form, teacher, temperature, sample_id))
    return form.loss(student, *rows, temperature=temperature).mean()


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


# ---- the folder ----


@pytest.fixture(scope="module")
def teacher() -> Any:
    return tiny_teacher()


def tiny_teacher(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return random_gpt2(VOCABULARY, 0, layers=1, width=32, positions=8, dropout=0.1).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_level_bpe(["a few words"], 260, 8)


def blocks(number: int = 40, size: int = 8, seed: int = 0) -> datasets.Dataset:
    """Rows of random tokens. The first labels of some rows are IGNORED, as those of prompts are."""
    torch.manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (number, size + 1))
    labels = tokens[:, 1:].clone()
    for row in range(0, number, 3):
        labels[row, : row // 3 % (size + 1)] = IGNORED
    columns = {"input_ids": tokens[:, :-1].numpy(), "labels": labels.numpy(), "length": [size] * number}
    return with_sample_ids(datasets.Dataset.from_dict(columns).with_format("torch"))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(teacher_logits, "SHARD_TOKENS", 64)  # 8 of the 40 rows


def opened(
    folder: Path,
    teacher: Any,
    tokenizer: Any,
    rows: Any = None,
    form: Form = WHOLE,
    temperature: float = 2.0,
) -> StoredLogits:
    store = LogitStore(folder, form, temperature, "fp32")
    return store.open(teacher, tokenizer, rows or blocks(), stack, batch_size=4)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*") if path.suffix == ".arrow"
    }


@pytest.mark.parametrize("form", [Top(k=VOCABULARY), Sample(k=3), Top(k=2)], ids=spec_of)
def test_shuffled_batches_have_the_loss_of_the_live_teacher(tmp_path, teacher, tokenizer, form):
    """Exactly that of its logits in the same form; for the whole vocabulary, the dense divergence within rounding."""
    store, rows = LogitStore(tmp_path, form, 2.0, "fp32"), blocks()
    stored = store.open(teacher, tokenizer, rows, stack, batch_size=4)
    term = store.replace_term(token_level(0.5, divergence_of("kd", 2.0))).terms[TOKENS][1]
    torch.manual_seed(5)
    for chosen in torch.randperm(40).split(7):
        batch = stack([rows[int(i)] for i in chosen])
        labels = batch["labels"]
        student = torch.randn(*labels.shape, VOCABULARY)
        found = term(Outputs(logits=student), stored.batch(batch["sample_id"]), labels)
        with torch.no_grad():
            logits = teacher(input_ids=batch["input_ids"]).logits
        parts = [
            columns_of(form, one[keep], 2.0, int(i))
            for one, keep, i in zip(logits, labels != IGNORED, batch["sample_id"], strict=True)
        ]
        expected = form.loss(student[labels != IGNORED], *form.rows(joined(parts)), temperature=2.0).mean()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        if form == Top(k=VOCABULARY):
            dense = soft_target_kl(student[labels != IGNORED], logits[labels != IGNORED], 2.0)
            torch.testing.assert_close(found, dense, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("form", [Top(k=VOCABULARY), Sample(k=2000)], ids=spec_of)
def test_a_teacher_in_bf16_has_the_loss_of_its_logits_within_rounding(tmp_path, teacher, tokenizer, form):
    """Autocast of a CPU refuses the fp16 of the columns."""
    store, rows = LogitStore(tmp_path, form, 2.0, "bf16"), blocks()
    stored = store.open(teacher, tokenizer, rows, stack, batch_size=4)
    batch, student = stack(list(rows)), torch.randn(40, 8, VOCABULARY)
    term = store.replace_term(token_level(0.5, divergence_of("kd", 2.0))).terms[TOKENS][1]
    found = term(Outputs(logits=student), stored.batch(batch["sample_id"]), batch["labels"])
    keep = batch["labels"] != IGNORED
    with torch.no_grad():
        dense = soft_target_kl(student[keep], teacher(input_ids=batch["input_ids"]).logits[keep], 2.0)
    torch.testing.assert_close(found, dense, rtol=2e-2, atol=0)


def test_a_batch_without_labels_has_a_loss_of_zero(tmp_path, teacher, tokenizer):
    rows = blocks()
    store = LogitStore(tmp_path, Sample(k=3), 2.0, "fp32")
    stored = store.open(teacher, tokenizer, rows, stack, batch_size=4)
    without = next(row for row in rows if (row["labels"] == IGNORED).all())
    batch, student = stack([without]), torch.randn(1, 8, VOCABULARY, requires_grad=True)
    term = store.replace_term(token_level(0.5, divergence_of("kd", 2.0))).terms[TOKENS][1]
    loss = term(Outputs(logits=student), stored.batch(batch["sample_id"]), batch["labels"])
    loss.backward()
    assert loss == 0 and not student.grad.any()


class Killed(BaseException):
    pass


def test_a_killed_process_continues_with_the_same_bytes(tmp_path, teacher, tokenizer, monkeypatch):
    form, write = Sample(k=3), teacher_outputs._write
    opened(tmp_path / "whole", teacher, tokenizer, form=form)

    def killed_at_the_fourth(folder: Path, *args: Any) -> None:
        if folder.name == "00003":
            raise Killed
        write(folder, *args)

    monkeypatch.setattr(teacher_outputs, "_write", killed_at_the_fourth)
    with pytest.raises(Killed):
        opened(tmp_path / "killed", teacher, tokenizer, form=form)
    assert len(contents(tmp_path / "killed")) == 3
    written: list[str] = []
    monkeypatch.setattr(
        teacher_outputs, "_write", lambda folder, *args: (written.append(folder.name), write(folder, *args))
    )
    opened(tmp_path / "killed", teacher, tokenizer, form=form)
    assert written == ["00003", "00004"]
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_another_batch_size_reads_the_same_folder(tmp_path, teacher, tokenizer, monkeypatch):
    opened(tmp_path, teacher, tokenizer)
    monkeypatch.setattr(teacher_outputs, "run_inference", None)  # not called
    store = LogitStore(tmp_path, Top(k=VOCABULARY), 2.0, "fp32")
    store.open(teacher, tokenizer, blocks(), stack, batch_size=5)


@pytest.mark.parametrize("form", [Top(k=3), Sample(k=3)], ids=spec_of)
def test_any_flipped_bit_is_refused(tmp_path, teacher, tokenizer, form):
    opened(tmp_path, teacher, tokenizer, form=form)
    path = sorted(tmp_path.rglob("*.arrow"))[1]
    whole = path.read_bytes()
    for place in range(0, len(whole), len(whole) // 12):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(UserError, match=r"is damaged: remove .*00001, and it is computed again"):
            opened(tmp_path, teacher, tokenizer, form=form)
    shutil.rmtree(path.parent)
    opened(tmp_path, teacher, tokenizer, form=form)
    assert path.read_bytes() == whole


def test_a_shard_of_another_folder_is_refused(tmp_path, teacher, tokenizer):
    for name, seed in (("one", 0), ("two", 1)):
        opened(tmp_path / name, tiny_teacher(seed), tokenizer)
    (one,), (two,) = (list((tmp_path / name).glob("*/00002")) for name in ("one", "two"))
    shutil.rmtree(one)
    shutil.copytree(two, one)
    with pytest.raises(UserError, match="00002 was stored for another teacher or dataset"):
        opened(tmp_path / "one", teacher, tokenizer)


def test_another_content_is_refused_and_named(tmp_path, teacher, tokenizer):
    opened(tmp_path, teacher, tokenizer)
    other_tokenizer = byte_level_bpe(["other words altogether"], 262, 8)
    ignoring = blocks()[:]
    ignoring["labels"][1, 0] = IGNORED
    for name, change in {
        "another teacher:": {"teacher": tiny_teacher(1)},
        "another tokenizer:": {"tokenizer": other_tokenizer},
        "another training data:": {"rows": blocks(size=4, number=80)},
        "another training data: ": {"rows": blocks(seed=1)},
        "another training data:  ": {"rows": datasets.Dataset.from_dict(ignoring).with_format("torch")},
        r"another form \(top:k=12, not sample:k=3": {"form": Sample(k=3)},
        r"another temperature \(2.0, not 1.0\)": {"temperature": 1.0},
        r"another form .* and temperature .*:": {"form": Top(k=2), "temperature": 3.0},
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=name.strip()):
            opened(**{"folder": tmp_path, "teacher": teacher, "tokenizer": tokenizer} | change)


def test_a_damaged_description_and_a_folder_of_other_files_are_refused(tmp_path, teacher, tokenizer):
    opened(tmp_path / "one", teacher, tokenizer)
    (tmp_path / "one" / "teacher_logits.json").write_text("{")
    with pytest.raises(UserError, match=r"teacher_logits.json is damaged: remove"):
        opened(tmp_path / "one", teacher, tokenizer)
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "notes.txt").write_text("of a user")
    with pytest.raises(UserError, match="is not empty and has no teacher_logits.json"):
        opened(tmp_path / "two", teacher, tokenizer)
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["notes.txt"]


def test_a_second_process_waits_until_the_folder_is_filled(tmp_path, teacher, tokenizer, monkeypatch, capsys):
    held = [UserError("FOLDER is in use by process 1: wait")] * 2
    lock = teacher_logits.lock_folder

    def lock_later(folder: Path) -> Any:
        if held:
            raise held.pop()
        return lock(folder)

    monkeypatch.setattr(teacher_logits, "POLL", 0.0)
    monkeypatch.setattr(teacher_logits, "lock_folder", lock_later)
    opened(tmp_path, teacher, tokenizer)
    assert capsys.readouterr().out == "waiting: FOLDER is in use by process 1\n"


def test_more_tokens_than_the_vocabulary_are_an_error(tmp_path, teacher, tokenizer):
    with pytest.raises(UserError, match=f"pass k={VOCABULARY}"):
        opened(tmp_path, teacher, tokenizer, form=Top(k=VOCABULARY + 1))
