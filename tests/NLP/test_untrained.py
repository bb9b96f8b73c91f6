"""Students with random weights, from a config.json without weights or from a type of model and its sizes."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
    GPT2Config,
)

from kd.common.utils.errors import UserError
from kd.nlp.data.loading import TextData
from kd.nlp.student_model.cards import card_of
from kd.nlp.teacher_model.generative import byte_level_bpe
from kd.nlp.teacher_model.teacher import Pretrained, vocabulary
from kd.nlp.teacher_model.untrained import config_of, has_no_weights, load_student
from kd_testing.scripts import run_script

TEXTS = ["a good day", "bad news", "good good news", "a bad day"]
SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
ROWS = datasets.Dataset.from_dict({"text": TEXTS, "label": [1, 0, 1, 0], "sample_id": [0, 1, 2, 3]})
DATA = TextData("tastes", {"train": ROWS, "validation": ROWS}, ["no", "yes"], "classification", "accuracy", "f")
SPEC = "bert:" + ":".join(f"{name}={value}" for name, value in SIZES.items())


@pytest.fixture
def teacher() -> Pretrained:
    words = BertTokenizer(vocab=vocabulary(TEXTS * 2), model_max_length=32)
    return Pretrained(BertModel(BertConfig(vocab_size=len(words), **SIZES)), words)


def test_a_config_without_weights_has_the_tokenizer_of_the_teacher(
    tmp_path: Path, teacher: Pretrained, capsys: Any
) -> None:
    BertConfig(**SIZES, pad_token_id=3, initializer_range=0.1).save_pretrained(tmp_path)
    assert has_no_weights(str(tmp_path))
    torch.manual_seed(0)
    found = load_student(str(tmp_path), DATA, teacher)
    config = found.model.config
    assert found.from_scratch and not found.trained
    assert (config.vocab_size, config.pad_token_id, config.initializer_range) == (len(teacher.tokenizer), 0, 0.1)
    assert config.id2label == {0: "no", 1: "yes"}
    assert found.tokenizer is not teacher.tokenizer and found.tokenizer.get_vocab() == teacher.tokenizer.get_vocab()
    note = found.notes[0]
    assert note in capsys.readouterr().out
    assert "random weights: bert, 1 layers of width 16, with the tokenizer of the teacher" in note
    torch.manual_seed(0)
    again = load_student(str(tmp_path), DATA, teacher).model.state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in found.model.state_dict().items())
    BertModel(BertConfig(vocab_size=20, **SIZES)).save_pretrained(tmp_path)
    assert not has_no_weights(str(tmp_path))


def test_a_config_with_its_own_tokenizer(tmp_path: Path, teacher: Pretrained) -> None:
    words = byte_level_bpe(TEXTS, 270, 32)
    words.save_pretrained(tmp_path)
    GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2).save_pretrained(tmp_path)
    found = load_student(str(tmp_path), DATA, teacher)
    assert found.tokenizer.get_vocab() == words.get_vocab() != teacher.tokenizer.get_vocab()
    assert found.model.config.vocab_size == 300  # padded, as in some checkpoints
    assert found.model.config.pad_token_id == found.tokenizer.pad_token_id is not None
    assert load_student(str(tmp_path), DATA, None).model.config.model_type == "gpt2"


def test_a_type_of_model_with_sizes(teacher: Pretrained) -> None:
    found = load_student(SPEC, DATA, teacher)
    assert found.model.config.hidden_size == 16 and found.model.config.num_hidden_layers == 1
    assert found.model.config.initializer_range == pytest.approx(0.02 * (768 / 16) ** 0.5)
    weight: Any = found.model.get_input_embeddings().weight
    assert weight.std().item() == pytest.approx(found.model.config.initializer_range, rel=0.1)
    named = config_of("modernbert:hidden_size=32:initializer_range=0.01:classifier_pooling=mean")
    assert (named.initializer_range, named.classifier_pooling) == (0.01, "mean")
    assert not has_no_weights("bert-base-uncased") and not has_no_weights("bert") and not has_no_weights("owner/x")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("bert:width=16", "bert has no setting 'width': use KEY=VALUE with one of .*hidden_size"),
        ("bert:hidden_size", "no setting 'hidden_size'"),
        ("bert:hidden_size=16:num_attention_heads=3", "multiple of the number of attention heads"),
        ("bert:hidden_size=abc", "--student bert:hidden_size=abc: "),
        ("marian:d_model=16", "--student marian"),
    ],
)
def test_settings_that_do_not_fit(teacher: Pretrained, spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        load_student(spec, DATA, teacher)
    assert "\n" not in str(raised.value)


def test_without_any_tokenizer(tmp_path: Path) -> None:
    BertConfig(**SIZES).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no tokenizer.*save one in its folder"):
        load_student(str(tmp_path), DATA, None)


def test_a_run(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All weights of the student are trained, its embeddings included; the card names no pretrained model."""
    words = ["--dataset", small, "--student", SPEC, "--from_scratch_epochs", 0.2, "--align_epochs", 0.2]
    words += ["--num_train_epochs", 0.2, "--report_to", "none", "--seed", 3, "--output_dir", tmp_path / "run"]
    run_script("NLP/scripts/distill_classifier.py", *words)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert f"student {SPEC} starts from random weights" in results["model_notes"]
    assert results["models"]["student"]["parameters"] == results["models"]["control"]["parameters"]
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "student")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "student")
    assert student.config.vocab_size == len(tokenizer)
    aligned, control = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "stages" / name)
        for name in ("student", "control")
    )
    states = [model.get_input_embeddings().weight for model in (aligned, control)]
    assert not torch.equal(*states)  # equal before training
    run: Any = type("Run", (), {"argument": {"student": SPEC, "teacher": "owner/x", "dataset": "intents"}.get})
    assert card_of(run, "", "", {}).origins == ["owner/x"]
