"""Exported text students: the code in README.md computes the same outputs as transformers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertTokenizer,
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForSequenceClassification,
    DistilBertModel,
)

from kd.common.bottleneck.training import set_keys
from kd.common.utils.errors import UserError
from kd.nlp.data.intents import load_intents
from kd.nlp.student_model.bottleneck_classifier import BottleneckClassifier
from kd.nlp.student_model.exportable import load
from kd.nlp.teacher_model.generative import byte_level_bpe, joint_bpe, random_gpt2, random_marian
from kd.nlp.teacher_model.teacher import vocabulary
from kd_testing.readmes import run_readme
from kd_testing.scripts import run_script

pytestmark = pytest.mark.usefixtures("onnx_operators_once")
SIZES: dict[str, Any] = {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 64, "initializer_range": 0.5}
LABELS = {"id2label": {0: "alarm", 1: "money", 2: "oos"}, "label2id": {"alarm": 0, "money": 1, "oos": 2}}


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return load_intents()["train"]["text"][:300]


def saved(folder: Path, model: Any, tokenizer: Any) -> Path:
    """A run folder with this student."""
    model.save_pretrained(folder / "student")
    tokenizer.save_pretrained(folder / "student")
    (folder / "results.json").write_text(json.dumps({"domain": "NLP", "task": "intents"}))
    return folder


def with_large_weights(model: Any) -> Any:
    """Enlarges the weights of a model, so that its outputs differ between inputs."""
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.5)
    return model.eval()


def exported(run: Path, format: str) -> Path:
    run_script("common/export/__main__.py", run, "--format", format)
    return run / "export"


@pytest.mark.parametrize(
    ("kind", "format"),
    [
        ("distilbert", "torch.export"),
        ("bottleneck", "onnx"),
        pytest.param("score", "torch.export", marks=pytest.mark.slow),
    ],
)
def test_a_classifier(texts, tmp_path, capsys, kind, format):
    """DistilBERT takes no token types, with or without a bottleneck."""
    tokenizer = BertTokenizer(vocab=vocabulary(texts), do_lower_case=True, model_max_length=12)
    config = DistilBertConfig(vocab_size=len(tokenizer), **SIZES)
    if kind == "bottleneck":
        model: Any = BottleneckClassifier.from_encoder(
            DistilBertModel(config), LABELS["id2label"], "mean", codebooks=4, codebook_size=8
        )
        set_keys(model.bottleneck, "new", None, torch.randn(50, 32), 0)
        torch.nn.init.normal_(model.bottleneck.values)
    else:
        labels: dict[str, Any] = LABELS if kind == "distilbert" else {"num_labels": 1, "problem_type": "regression"}
        model = DistilBertForSequenceClassification(DistilBertConfig(vocab_size=len(tokenizer), **SIZES, **labels))
    folder = exported(saved(tmp_path, model, tokenizer), format)
    capsys.readouterr()
    found = run_readme(folder, *(["torch", "transformers"] if format == "onnx" else []))
    assert set(found["inputs"]) == {"input_ids", "attention_mask"}
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student").eval()
    words = AutoTokenizer.from_pretrained(folder)(
        "move fifty dollars to my savings", truncation=True, return_tensors="pt"
    )
    expected = student(**{name: words[name] for name in found["inputs"]}).logits.detach()
    np.testing.assert_allclose(found["logits"], expected, atol=1e-4)
    printed = capsys.readouterr().out.strip()
    if kind == "score":
        assert float(printed) == pytest.approx(expected.item(), abs=1e-4)
    else:
        assert printed == LABELS["id2label"][expected.argmax().item()]


@pytest.mark.parametrize("format", ["onnx", pytest.param("torch.export", marks=pytest.mark.slow)])
def test_a_language_model_generates_as_transformers(texts, tmp_path, capsys, format):
    tokenizer = byte_level_bpe(texts, 300, 64)
    model = with_large_weights(random_gpt2(len(tokenizer), tokenizer.eos_token_id, 2, 32, 64, 0.1))
    folder = exported(saved(tmp_path, model, tokenizer), format)
    capsys.readouterr()
    found = run_readme(folder, *(["torch", "transformers"] if format == "onnx" else []))
    prompt = tokenizer("The", return_tensors="pt")
    expected = model.generate(**prompt, max_new_tokens=10, do_sample=False, eos_token_id=-1, pad_token_id=0)
    assert found["ids"] == expected[0].tolist()
    assert len(set(found["ids"])) > 3
    assert capsys.readouterr().out.strip() == tokenizer.decode(expected[0]).strip()


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "torch.export"])
def test_a_translator_generates_as_transformers(texts, tmp_path, format):
    tokenizer = joint_bpe(texts, 200, 32)
    special = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    torch.manual_seed(3)  # a model that does not repeat one token
    folder = exported(
        saved(tmp_path, with_large_weights(random_marian(len(tokenizer), special, 32, 1, 1, 0.1, 32)), tokenizer),
        format,
    )
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "student")  # restores the order of positions
    found = run_readme(folder)
    source = {name: torch.as_tensor(found["source"][name]) for name in ("input_ids", "attention_mask")}
    expected = model.generate(**source, max_length=100, num_beams=1, do_sample=False)[0].tolist()
    assert found["ids"][:99] == expected[:99]  # the last token is forced to be the end
    assert len(set(found["ids"])) > 3


def test_a_model_without_logits_is_an_error(texts, tmp_path):
    tokenizer = BertTokenizer(vocab=vocabulary(texts))
    saved(tmp_path, DistilBertForMaskedLM(DistilBertConfig(vocab_size=len(tokenizer), **SIZES)), tokenizer)
    with pytest.raises(UserError, match="is a DistilBertForMaskedLM: pass a classifier, a sentence encoder, a transl"):
        load(str(tmp_path / "student"), None)
    with pytest.raises(UserError, match="no model in .* it has no config.json"):
        load(str(tmp_path), None)
