"""NLP/scripts/export.py: its files and figures, the printed code without torch, and bad input."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

import kd.common.export.onnx
from kd.common.bottleneck.training import set_keys
from kd.common.export.int8 import load_int8
from kd.common.export.onnx import OnnxModel
from kd.nlp.data.loading import load_text_data
from kd.nlp.student_model.bottleneck_classifier import BottleneckClassifier
from kd.nlp.teacher_model.teacher import label_config, tiny_bert
from kd_testing.scripts import run_script

pytestmark = pytest.mark.usefixtures("onnx_operators_once")
WORDS = {"alarm": ["wake", "clock", "morning"], "money": ["bank", "euro", "send"], "oos": ["sea", "moon", "why"]}
LENGTH = 12  # longer texts are truncated


@pytest.fixture(autouse=True)
def _reset_device():
    """The script selects the CPU; other tests of this process may use a GPU."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def scoped(tmp_path_factory) -> Path:
    """A small dataset with an out-of-scope class and texts of all lengths."""
    folder = tmp_path_factory.mktemp("data") / "scoped"
    generator = np.random.default_rng(0)
    for split, rows in (("train", 60), ("validation", 90), ("test", 90)):
        labels = [list(WORDS)[i % 3] for i in range(rows)]
        texts = [
            " ".join(generator.choice([*WORDS[label], "the", "a"], generator.integers(1, 20))) for label in labels
        ]
        Dataset.from_dict({"text": texts, "label": labels}).to_parquet(folder / f"{split}.parquet")
    return folder


def saved(kind: str, scoped: Path, folder: Path) -> Path:
    """A classifier of the dataset's labels with random weights, large enough for its predictions to differ."""
    data = load_text_data(str(scoped))
    pretrained = tiny_bert(data)
    sizes: dict[str, Any] = {"vocab_size": len(pretrained.tokenizer), "initializer_range": 0.2}
    shape = sizes | {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
    torch.manual_seed(0)
    if kind == "distilbert":
        narrow = sizes | {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 64}
        model: Any = DistilBertForSequenceClassification(DistilBertConfig(**narrow, **label_config(data)))
    elif kind == "bert":
        model = BertForSequenceClassification(BertConfig(**shape, **label_config(data)))
    else:
        labels = dict(enumerate(data.label_names))
        model = BottleneckClassifier.from_encoder(
            BertModel(BertConfig(**shape)), labels, "mean", codebooks=8, codebook_size=16
        )
        set_keys(model.bottleneck, "new", None, torch.randn(200, 64), 0)
        torch.nn.init.normal_(model.bottleneck.values)
    model.save_pretrained(folder)
    pretrained.tokenizer.model_max_length = LENGTH
    pretrained.tokenizer.save_pretrained(folder)
    return folder


def export(student: Path, scoped: Path, *words: object) -> None:
    run_script("NLP/scripts/export.py", student, "--dataset", scoped, *words)


@pytest.fixture(scope="session")
def exported(scoped, tmp_path_factory) -> Path:
    """The export of a BERT in all formats, next to its folder `student`."""
    folder = tmp_path_factory.mktemp("run")
    teacher = saved("distilbert", scoped, folder / "teacher")
    export(saved("bert", scoped, folder / "student"), scoped, "--teacher", teacher)
    return folder / "export"


def figures(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "export.json").read_text())["models"]


# ---- files and figures ----


def test_figures(exported, scoped, tmp_path):
    found = figures(exported)
    assert list(found) == ["teacher", "student", "torch-int8", "onnx", "onnx-int8"]
    for name, file in (
        ("torch-int8", "model_int8.safetensors"),
        ("onnx", "model.onnx"),
        ("onnx-int8", "model_int8.onnx"),
    ):
        assert found[name]["megabytes"] == (exported / file).stat().st_size / 2**20
    fp32 = (exported.parent / "student" / "model.safetensors").stat().st_size / 2**20
    assert found["student"]["megabytes"] == pytest.approx(fp32, rel=0.02)
    assert found["torch-int8"]["megabytes"] < 0.5 * fp32
    run_script(
        "NLP/scripts/evaluate.py", exported.parent / "student", "--dataset", scoped, "--json", tmp_path / "m.json"
    )
    measured = json.loads((tmp_path / "m.json").read_text())["metrics"]
    for split in ("validation", "test"):
        assert "oos_recall_threshold" in measured[split]
        for name in ("student", "onnx"):
            assert found[name]["metrics"][split] == pytest.approx(measured[split] | {"agreement": 1.0}, abs=1e-5)
        for name in ("torch-int8", "onnx-int8"):
            assert 0.9 < found[name]["metrics"][split]["agreement"]
        assert found["teacher"]["metrics"][split]["agreement"] < 0.9
    for entry in found.values():
        assert entry["speedup"] == found["student"]["latency_ms"]["median"] / entry["latency_ms"]["median"]
    table = [line for line in (exported / "export.md").read_text().splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(found)


def test_the_student_predicts_several_classes(exported, scoped):
    """Agreement is meaningless for a student that predicts a single class."""
    model = AutoModelForSequenceClassification.from_pretrained(exported.parent / "student")
    tokenizer = AutoTokenizer.from_pretrained(exported.parent / "student")
    texts = load_text_data(str(scoped)).splits["test"]["text"][:]
    predictions = model(**tokenizer(texts, truncation=True, padding=True, return_tensors="pt")).logits.argmax(1)
    assert predictions.bincount().sort().values[-2] > 10


WITHOUT_TORCH = """
import sys
sys.modules |= dict.fromkeys(["torch", "transformers", "kd"])  # importing one of these is an error
exec(open(sys.argv[1]).read())
"""


def blocks(folder: Path) -> list[str]:
    return re.findall("```python\n(.*?)```", (folder / "export.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("text", ["wake the moon", "send a euro " * 10])
def test_the_printed_code_runs_without_torch_and_truncates(exported, tmp_path, text):
    (tmp_path / "code.py").write_text(blocks(exported)[0].replace("move fifty dollars to my savings", text))
    command = [sys.executable, "-c", WITHOUT_TORCH, str(tmp_path / "code.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    inputs = tokenizer(text, truncation=True, return_tensors="pt")
    assert inputs["input_ids"].shape[1] <= LENGTH
    logits = OnnxModel(exported / "model_int8.onnx")(**inputs).logits
    labels = json.loads((exported / "config.json").read_text())["id2label"]
    assert done.stdout.strip() == labels[str(logits.argmax().item())]


def test_the_printed_code_loads_the_int8_weights_of_torch(exported, capsys):
    found: dict[str, Any] = {}
    exec(blocks(exported)[1], found)
    assert capsys.readouterr().out.strip() in WORDS
    weights = found["model"].bert.embeddings.word_embeddings.weight
    assert weights.dtype == torch.int8
    fp32 = AutoModelForSequenceClassification.from_pretrained(exported.parent / "student").eval()
    assert torch.equal(
        load_int8(fp32, exported / "model_int8.safetensors").classifier.weight, found["model"].classifier.weight
    )


def test_int8_values_keep_the_predictions_and_shrink_the_file(scoped, tmp_path):
    student = saved("bottleneck", scoped, tmp_path / "student")
    export(student, scoped, "--formats", "torch-int8")
    found = figures(tmp_path / "export")["torch-int8"]
    size = figures(tmp_path / "export")["student"]["bytes"]
    assert found["metrics"]["test"]["agreement"] > 0.95
    assert (size["keys"], size["values"], size["decoder"]) == (8 * 16 * 8 * 4, 8 * 16 * 16 * 4, (128 * 3 + 3) * 4)
    assert size["counts"] == size["keys"] + 8 * 16 * 4 + 1  # sums and counts of moving averages, and a flag
    assert size["codes_of_an_embedding"] == 4  # eight codebooks of 4 bits
    fp32 = (student / "model.safetensors").stat().st_size
    assert sum(size.values()) - 4 == pytest.approx(fp32, rel=0.02)
    assert found["bytes"]["values"] == 8 * 16 * (16 + 4)
    assert found["bytes"]["keys"] == size["keys"] and found["bytes"]["counts"] == 0
    assert "| values | 8,192 | 2,560 |" in (tmp_path / "export" / "export.md").read_text()


@torch.no_grad()
@pytest.mark.slow
def test_a_student_with_a_bottleneck(scoped, tmp_path):
    student = saved("bottleneck", scoped, tmp_path / "student")
    export(student, scoped)
    folder = tmp_path / "export"
    for name in ("torch-int8", "onnx-int8"):
        assert figures(folder)[name]["metrics"]["test"]["agreement"] > 0.7
    model, tokenizer = BottleneckClassifier.from_pretrained(student), AutoTokenizer.from_pretrained(folder)
    for texts in (["wake"], ["why the sea", "send", "a euro in the morning"]):
        inputs = tokenizer(texts, padding=True, return_tensors="pt")
        expected = model.eval()(**inputs).logits
        torch.testing.assert_close(OnnxModel(folder / "model.onnx")(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_an_export_in_another_format_replaces_the_first(scoped, tmp_path):
    """The student is a DistilBERT, which takes no token types."""
    student, folder = saved("distilbert", scoped, tmp_path / "student"), tmp_path / "elsewhere"
    export(student, scoped, "--formats", "onnx-int8", "--output_dir", folder)
    assert list(figures(folder)) == ["student", "onnx-int8"]
    assert {path.suffix for path in folder.iterdir()} == {".onnx", ".json", ".md", ""}  # and SHA256SUMS
    assert not (folder / "model.onnx").exists()
    export(student, scoped, "--formats", "torch-int8", "--output_dir", folder, "--overwrite_output_dir")
    assert list(figures(folder)) == ["student", "torch-int8"]
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json", ".md", ""}


# ---- errors ----


def error_of(capsys, student: Path, scoped: Path, *words: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        export(student, scoped, *words)
    error = capsys.readouterr().err.replace("\r", "\n").splitlines()[-1]
    assert stopped.value.code == 2
    assert error.startswith("error: ")
    return error


def test_a_wrong_graph_writes_nothing(capsys, scoped, tmp_path, monkeypatch):
    student = saved("distilbert", scoped, tmp_path / "student")

    def wrong(model: Any, *others: Any, to_onnx: Any = kd.common.export.onnx.to_onnx) -> None:
        with torch.no_grad():
            model.classifier.bias += 0.01
            to_onnx(model, *others)
            model.classifier.bias -= 0.01

    monkeypatch.setattr(kd.common.export.onnx, "to_onnx", wrong)
    error = error_of(capsys, student, scoped, "--formats", "onnx")
    assert "on 90 of 90 texts of validation" in error
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_bad_input(capsys, scoped, exported, tmp_path):
    student = exported.parent / "student"
    before = (exported / "export.json").read_bytes()
    assert "--overwrite_output_dir" in error_of(capsys, student, scoped)
    assert "invalid choice: 'onxn'" in error_of(capsys, student, scoped, "--formats", "onxn")
    assert "no folder" in error_of(capsys, tmp_path / "missing", scoped)
    assert "no model" in error_of(capsys, tmp_path, scoped, "--output_dir", tmp_path / "x")
    other = error_of(capsys, student, scoped, "--output_dir", student, "--overwrite_output_dir")
    assert "is not an export" in other
    BertModel(BertConfig(vocab_size=100, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(
        tmp_path / "encoder"
    )
    AutoTokenizer.from_pretrained(student).save_pretrained(tmp_path / "encoder")
    assert "not a trained classifier" in error_of(capsys, tmp_path / "encoder", scoped)
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]
    assert (exported / "export.json").read_bytes() == before
