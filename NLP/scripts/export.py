"""Exports a text classifier to ONNX and int8, and measures the size, latency and metrics of each file on a dataset.

    python NLP/scripts/export.py runs/NLP/clinc
    python NLP/scripts/export.py runs/NLP/clinc/student --dataset clinc_oos --formats onnx-int8 \\
        --teacher runs/NLP/clinc/stages/teacher --output_dir exported

Writes model.onnx, model_int8.onnx and model_int8.safetensors (int8 weights, and values of a bottleneck, for torch),
the tokenizer, the labels (config.json), the results (export.json), and a table with the code that loads the files
(export.md). The fp32 ONNX graph must reproduce the student's logits on all labelled validation and test texts;
otherwise nothing is written. The int8 models are compared with the student by their metrics and agreement. Everything
runs on the CPU. To export without a dataset, use `python -m kd.common.export`.
"""

from pathlib import Path
from typing import Any

from kd.common.cli import Parser, run, show_help
from kd.nlp.student_model.arguments import DATA_ARGUMENTS, add_data_arguments

FILES = {"torch-int8": "model_int8.safetensors", "onnx": "model.onnx", "onnx-int8": "model_int8.onnx"}
PARSER = Parser(description=__doc__)
PARSER.add_argument("student", help="A run, for its student, or a folder or Hub name of the classifier to export.")
add_data_arguments(PARSER)
PARSER.add_argument("--formats", nargs="+", choices=list(FILES), default=list(FILES), help="Formats to export to.")
PARSER.add_argument("--teacher", help="Folder or Hub name of a classifier to compare with.")
PARSER.add_argument("--output_dir", help="Folder of the export (default: export, next to the student's folder).")
PARSER.add_argument("--overwrite_output_dir", action="store_true", help="Replace an earlier export.")
if __name__ == "__main__":
    show_help(parser=PARSER)  # before the imports below, which take seconds

import datasets
import numpy as np
import onnxruntime
import torch
from accelerate import PartialState
from safetensors.torch import save_model
from transformers import PreTrainedModel

from kd.common.bottleneck.sizes import Table, byte_table, sizes
from kd.common.export.exportable import (
    LOAD_ONNX,
    RECORD,
    check_equal,
    max_abs_difference,
    output_folder,
    share_of_ties,
)
from kd.common.export.int8 import load_int8, quantize_dynamic
from kd.common.export.onnx import OnnxModel, quantize_onnx, to_onnx
from kd.common.metrics.cost import interleaved_latency, megabytes
from kd.common.reporting.saved_models import parse_with_recipe, saved_model
from kd.common.reporting.tables import markdown, number, print_rich
from kd.common.training.inference import NOT_INPUTS
from kd.common.utils.devices import command, environment
from kd.common.utils.files import write_json, write_text, writing_folder
from kd.nlp.data.loading import TextData, Texts
from kd.nlp.student_model.evaluation import load_data_of, median_text, metrics_by_split, predict_splits
from kd.nlp.student_model.exportable import classifier_usage
from kd.nlp.teacher_model.teacher import auto_class, load_trained

TITLES = {"teacher": "teacher, torch fp32", "student": "student, torch fp32", "torch-int8": "student, torch int8",
          "onnx": "student, ONNX fp32", "onnx-int8": "student, ONNX int8"}  # fmt: skip
LOAD_INT8 = """from transformers import AutoConfig, {auto}, AutoTokenizer
from kd.common.export.int8 import load_int8
from kd.nlp.student_model.bottleneck_classifier import BottleneckClassifier  # only for a student with a bottleneck

folder = "{folder}"
tokenizer = AutoTokenizer.from_pretrained(folder)
architecture = {auto}.from_config(AutoConfig.from_pretrained(folder))
model = load_int8(architecture, f"{{folder}}/{file}")
logits = model(**tokenizer("move fifty dollars to my savings", return_tensors="pt")).logits
print({prediction})"""
Models = dict[str, tuple[Any, Texts]]  # a model, and the data in its tokens


def main() -> None:
    args = parse_with_recipe(PARSER, DATA_ARGUMENTS, "student")
    args.student = saved_model(args.student)

    folder = output_folder(args.student, args.output_dir, args.overwrite_output_dir)
    PartialState(cpu=True)  # also with a GPU: int8 inference and the latencies are for a CPU
    datasets.disable_progress_bars()
    data = load_data_of(args.student, args)
    names = {"teacher": args.teacher, "student": args.student}
    models = {role: load_classifier(name, data) for role, name in names.items() if name}
    student, texts = models["student"]
    with writing_folder(folder) as partial:
        models |= {name: (model, texts) for name, model in export(student, texts, args.formats, partial).items()}
        logits = {name: predict_splits(model, texts) for name, (model, texts) in models.items()}
        if "onnx" in models:
            for split, expected in logits["student"].items():
                differences = max_abs_difference(expected, logits["onnx"][split])
                check_equal(args.student, differences, f"texts of {split}", ties=share_of_ties(student))
        if "onnx" in models and "onnx" not in args.formats:  # only the int8 graph needed it
            del models["onnx"]
            (partial / FILES["onnx"]).unlink()
        results = {
            "student": args.student,
            "teacher": args.teacher,
            "task": data.name,
            "data": {"fingerprint": data.fingerprint},
            "primary_metric": data.primary_metric,
            "models": measure(models, logits, partial),
            "command": command(),
            "environment": environment("fp32", "cpu") | {"onnxruntime": onnxruntime.__version__},
        }
        student.config.save_pretrained(partial)
        texts.collate.tokenizer.save_pretrained(partial)
        write_json(partial / RECORD, results)
        byte_counts = byte_table({TITLES[name]: entry["bytes"] for name, entry in results["models"].items()})
        write_text(partial / "export.md", report(results, byte_counts, student, texts, folder))
    if byte_counts:
        print_rich(*byte_counts, title="bytes of the parts")
    print_rich(*table(results), title=f"{args.student}, exported", below=f"export: {folder}")


def load_classifier(name: str, data: TextData) -> tuple[Any, Texts]:
    """Loads a classifier of the data's labels in fp32, and tokenizes the data for it."""
    classifier = load_trained(name, data)
    return classifier.model.eval(), Texts.of(data, classifier.tokenizer)


def export(student: PreTrainedModel, texts: Texts, formats: list[str], folder: Path) -> dict[str, Any]:
    """Writes the files of `formats` (and that of `onnx` for `onnx-int8`). Returns the models loaded from them."""
    paths = {name: folder / file for name, file in FILES.items()}
    models: dict[str, Any] = {}
    if "torch-int8" in formats:
        save_model(quantize_dynamic(student), str(paths["torch-int8"]))
        models["torch-int8"] = load_int8(student, paths["torch-int8"])
    if "onnx" in formats or "onnx-int8" in formats:
        batch = texts.collate([next(iter(texts.splits.values()))[0]] * 2)
        inputs = {name: value for name, value in batch.items() if name not in NOT_INPUTS}
        to_onnx(student, inputs, paths["onnx"], {0: "batch", 1: "position"})
        models["onnx"] = OnnxModel(paths["onnx"])
    if "onnx-int8" in formats:
        quantize_onnx(paths["onnx"], paths["onnx-int8"])
        models["onnx-int8"] = OnnxModel(paths["onnx-int8"])
    return models


def measure(models: Models, logits: dict[str, dict[str, np.ndarray]], folder: Path) -> dict[str, Any]:
    """Measures the size of each model in MiB, its latency for a text of median length, its speed-up and metrics."""
    cpu = torch.device("cpu")
    inputs = {name: (model, median_text(texts, cpu)) for name, (model, texts) in models.items()}
    latencies = interleaved_latency(inputs)
    return {
        name: {
            "megabytes": (folder / FILES[name]).stat().st_size / 2**20 if name in FILES else megabytes(model),
            "latency_ms": latencies[name],
            "speedup": latencies["student"]["median"] / latencies[name]["median"],
            "metrics": metrics_by_split(texts, logits[name], logits["student"]),
            "bytes": sizes(model),
        }
        for name, (model, texts) in models.items()
    }


def table(results: dict[str, Any]) -> Table:
    metric = results["primary_metric"]
    splits = list(results["models"]["student"]["metrics"])
    header = ["model", "MB", "latency (ms)", "90th percentile", "speed-up", *(f"{split} {metric}" for split in splits)]
    rows = []
    for name, entry in results["models"].items():
        figures = [entry["megabytes"], entry["latency_ms"]["median"], entry["latency_ms"]["p90"], entry["speedup"]]
        figures += [entry["metrics"][split][metric] for split in splits]
        figures += [entry["metrics"][split].get("agreement") for split in splits]
        rows.append([TITLES[name], *map(number, figures)])
    return header + [f"{split} agreement" for split in splits], rows


def report(
    results: dict[str, Any], byte_counts: Table | None, student: PreTrainedModel, texts: Texts, folder: Path
) -> str:
    environment, models = results["environment"], results["models"]
    onnx = next((FILES[name] for name in ("onnx-int8", "onnx") if name in models), None)
    usages = []
    if onnx:
        usage = classifier_usage(student, texts.collate.tokenizer)
        usages.append(f"{LOAD_ONNX.format(folder=folder, file=onnx)}\n\n\n{usage}")
    if "torch-int8" in models:
        prediction = {
            "multi_label": "logits.sigmoid()",
            "token_classification": "[model.config.id2label[i] for i in logits[0].argmax(-1).tolist()]",
        }.get(texts.data.task, "model.config.id2label[logits.argmax().item()]")
        auto = auto_class(texts.data).__name__
        usages.append(LOAD_INT8.format(folder=folder, file=FILES["torch-int8"], auto=auto, prediction=prediction))
    sections = [
        f"# {results['student']}, exported",
        markdown(*table(results)),
        *([markdown(*byte_counts)] if byte_counts else []),
        f"Task {results['task']}. Latency: one text of median length, measured alternately on {environment['device']} "
        f"(threads: {environment['threads']}) with torch {environment['torch']} and ONNX Runtime "
        f"{environment['onnxruntime']}. Agreement: the share of predictions that equal those of the student in torch "
        "fp32.",
        "## Load it",
        *(f"```python\n{usage}\n```" for usage in usages),
    ]
    return "\n\n".join(sections) + "\n"


if __name__ == "__main__":
    run(main)
