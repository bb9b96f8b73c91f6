"""What an exported classifier is worth beside the one it was made of: size, speed, metrics, and how to load it."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kd.common.export.__main__ import LOAD_ONNX
from kd.common.metrics.cost import interleaved_latency, megabytes
from kd.common.reporting.tables import markdown, number
from kd.nlp.data.loading import TextData
from kd.nlp.data.tokenized import Texts
from kd.nlp.student_model.evaluation import metrics_by_split, one_text
from kd.nlp.student_model.exportable import classifier_usage

FILES = {"torch-int8": "model_int8.safetensors", "onnx": "model.onnx", "onnx-int8": "model_int8.onnx"}
TITLES = {"teacher": "teacher, torch fp32", "student": "student, torch fp32", "torch-int8": "student, torch int8",
          "onnx": "student, ONNX fp32", "onnx-int8": "student, ONNX int8"}  # fmt: skip

INT8_USAGE = """from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from kd.common.export.int8 import load_int8
from kd.nlp.student_model.bottleneck_classifier import BottleneckClassifier  # only for a student with a bottleneck

folder = "{folder}"
tokenizer = AutoTokenizer.from_pretrained(folder)
architecture = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(folder))
model = load_int8(architecture, f"{{folder}}/{file}")
logits = model(**tokenizer("move fifty dollars to my savings", return_tensors="pt")).logits
print(model.config.id2label[logits.argmax().item()])"""


def measured(
    models: dict[str, tuple[Any, Texts]], logits: dict[str, dict[str, np.ndarray]], data: TextData, folder: Path
) -> dict[str, Any]:
    """For each model its MiB on disk, latency of one text of median length, speed-up and metrics."""
    cpu = torch.device("cpu")
    inputs = {name: (model, one_text(texts.splits, texts.collate, cpu)) for name, (model, texts) in models.items()}
    latencies = interleaved_latency(inputs)
    return {
        name: {
            "megabytes": (folder / FILES[name]).stat().st_size / 2**20 if name in FILES else megabytes(model),
            "latency_ms": latencies[name],
            "speedup": latencies["student"]["median"] / latencies[name]["median"],
            "metrics": metrics_by_split(data, logits[name], texts.splits, logits["student"]),
        }
        for name, (model, texts) in models.items()
    }


def table(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    metric = results["primary_metric"]
    splits = list(results["models"]["student"]["metrics"])
    header = ["model", "MB", "latency in ms, median", "90 %", "speed-up", *(f"{split} {metric}" for split in splits)]
    rows = []
    for name, entry in results["models"].items():
        figures = [entry["megabytes"], entry["latency_ms"]["median"], entry["latency_ms"]["p90"], entry["speedup"]]
        figures += [entry["metrics"][split][metric] for split in splits]
        figures += [entry["metrics"][split].get("agreement") for split in splits]
        rows.append([TITLES[name], *map(number, figures)])
    return header + [f"{split} agreement" for split in splits], rows


def report(results: dict[str, Any], student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> str:
    environment, models = results["environment"], results["models"]
    onnx = next((FILES[name] for name in ("onnx-int8", "onnx") if name in models), None)
    usages = []
    if onnx:
        loading = LOAD_ONNX.format(folder=folder, file=onnx)
        usages.append(f"{loading}\n\n\n{classifier_usage(student, tokenizer)}")
    if "torch-int8" in models:
        usages.append(INT8_USAGE.format(folder=folder, file=FILES["torch-int8"]))
    sections = [
        f"# {results['student']}, exported",
        markdown(*table(results)),
        f"Task {results['task']}. Latency: one text of median length, measured in turns on {environment['device']} "
        f"(threads: {environment['threads']}) with torch {environment['torch']} and ONNX Runtime "
        f"{environment['onnxruntime']}. Agreement: the share of predictions that are those of the student in torch "
        "fp32.",
        "## Load it",
        *(f"```python\n{usage}\n```" for usage in usages),
    ]
    return "\n\n".join(sections) + "\n"
