"""benchmarks/kd_training.py on a few texts: its table, and the equality of both losses."""

import re
import runpy
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from kd.common.methods import labels_and_soft_targets
from kd.common.outputs import Outputs
from kd.nlp.data import loading
from kd.nlp.data.loading import TextData
from kd_testing.paths import REPO

SCRIPT = str(REPO / "benchmarks" / "kd_training.py")


@pytest.fixture(scope="module")
def benchmark() -> dict:
    return runpy.run_path(SCRIPT)


@pytest.fixture(scope="module")
def data() -> TextData:
    texts = ["switch on the lamp", "what is the weather", "switch it off", "will it rain in the city today"] * 3
    rows = Dataset.from_dict({"text": texts, "label": [0, 1] * 6, "sample_id": list(range(12))})
    return TextData(
        "few", {"train": rows, "validation": rows}, ["lights", "weather"], "classification", "accuracy", "few"
    )


def test_every_variant_trains_and_has_its_line(benchmark, data, capsys):
    case = benchmark["make_case"](data, "tiny-bert", student_layers=1, batch_size=4, steps=3)
    seconds = case.fill_cache("fp32")
    rates = {name: [case.samples_per_second(variant, 0)] for name, variant in benchmark["variants"]("fp32").items()}
    capsys.readouterr()
    benchmark["report"](rates, seconds, 12)
    *table, cache = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + len(rates)
    ratios = [[float(cell) for cell in line.split("|")[3:6:2]] for line in table[2:]]
    assert ratios[0] == [1.0, 1.0]
    assert all(ratio > 0 for line in ratios for ratio in line)
    assert re.search(r"cache of 12 texts took .* epochs", cache)


def test_the_table_holds_the_rates(benchmark, capsys):
    names = list(benchmark["variants"]("bf16"))
    rates = {name: [(10.0 * i, 5.0 * i), (20.0 * i, 5.0 * i)] for i, name in enumerate(names, start=1)}
    rates[names[-1]] = [(5.0, 5.0), (5.0, 5.0)]
    benchmark["report"](rates, (1.0, 126.0), texts=360)
    *table, cache = capsys.readouterr().out.splitlines()
    assert table[4] == "| + cached teacher logits | 45 (60) | 3.00 | 15 (15) | 3.00 |"
    assert "after 2.0 epochs" in cache  # 72 CPU-seconds an epoch with the teacher in every step, 9 without


def test_both_trainers_minimize_the_same_loss(benchmark):
    student_logits, teacher_logits, labels = torch.randn(5, 3), torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 0])
    student = SimpleNamespace(logits=student_logits, loss=torch.nn.functional.cross_entropy(student_logits, labels))
    trainer = SimpleNamespace(teacher=lambda **inputs: Outputs(logits=teacher_logits))
    textbook = benchmark["TextbookTrainer"].compute_loss(trainer, lambda **inputs: student, {})
    objective = labels_and_soft_targets(benchmark["ALPHA"], benchmark["TEMPERATURE"]).objective
    parts = objective(Outputs(logits=student_logits), Outputs(logits=teacher_logits), labels)
    torch.testing.assert_close(textbook, sum(parts.values()))


def test_the_default_teacher_has_the_size_of_minilm(benchmark, data):
    encoder = benchmark["random_minilm"](data).encoder
    assert sum(p.numel() for p in encoder.parameters()) == 22_713_216  # of sentence-transformers/all-MiniLM-L6-v2


def test_teacher_outputs_of_a_few_texts(monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "MANY_ROWS", 100)
    measure = runpy.run_path(str(REPO / "benchmarks" / "teacher_outputs.py"))["measure"]
    first, _, *table = measure(tmp_path, 300, {"layer_0": "bert.encoder.layer.0"}, 64).splitlines()
    assert first.startswith("300 texts; 0 MiB") and len(table) == 7
    assert all(float(line.split("|")[4].replace(",", "")) > 0 for line in table[2:])
