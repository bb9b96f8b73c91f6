"""Takes a trained classifier away: ONNX and int8 versions that need no torch, or less memory, and what each is worth.

    python NLP/scripts/export.py runs/NLP/clinc/student --dataset clinc_oos
    python NLP/scripts/export.py runs/NLP/clinc/student --dataset clinc_oos --formats onnx-int8 \\
        --teacher runs/NLP/clinc/stages/teacher_encoder --output_dir exported

Writes model.onnx, model_int8.onnx and model_int8.safetensors (the int8 weights of torch), the tokenizer, the labels
(config.json), the figures (export.json) and one table with the code that loads the files (export.md). The ONNX graph
in fp32 must say what the student says on every labelled validation and test text, or nothing is written; what int8
costs is measured. All of it runs on the CPU.
"""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import onnxruntime
from accelerate import PartialState
from safetensors.torch import save_model
from transformers.utils import logging as transformers_logging

from kd.common.cli import Parser, run
from kd.common.export.__main__ import RECORD, output_folder
from kd.common.export.exportable import apart, refuse_other_answers, share_of_ties
from kd.common.export.int8 import load_int8, quantize_dynamic
from kd.common.export.onnx import OnnxModel, quantize_onnx, to_onnx
from kd.common.reporting.tables import print_rich
from kd.common.training.inference import NOT_INPUTS
from kd.common.utils.devices import command, environment
from kd.common.utils.files import write_json, write_text
from kd.common.utils.folders import writing_folder
from kd.nlp.data.loading import TextData
from kd.nlp.data.tokenized import Texts
from kd.nlp.student_model import measured_data
from kd.nlp.student_model.evaluation import predict
from kd.nlp.student_model.export_report import FILES, measured, report, table
from kd.nlp.teacher_model.teacher import load_trained


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("student", help="folder or Hub name of a classifier")
    measured_data.add_data_flags(parser)
    parser.add_argument("--formats", nargs="+", choices=list(FILES), default=list(FILES))
    parser.add_argument("--teacher", help="folder or Hub name of a classifier to compare with")
    parser.add_argument("--output_dir", help="default: export, beside the student's folder")
    parser.add_argument("--overwrite_output_dir", action="store_true", help="replace an earlier export")
    args = parser.parse_args()

    folder = output_folder(args.student, args.output_dir, args.overwrite_output_dir)
    PartialState(cpu=True)  # also where there is a GPU: int8 and latencies are those of a CPU
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    data = measured_data.load(args.student, args)
    student, texts = trained(args.student, data)
    models = {"teacher": trained(args.teacher, data)} if args.teacher else {}
    models["student"] = student, texts
    with writing_folder(folder) as partial:
        models |= {name: (model, texts) for name, model in exported(student, texts, args.formats, partial).items()}
        logits = {name: said_by(model, texts) for name, (model, texts) in models.items()}
        if "onnx" in models:
            for split, said in logits["student"].items():
                distances = apart(said, logits["onnx"][split])
                refuse_other_answers(args.student, distances, f"texts of {split}", tied=share_of_ties(student))
        if "onnx" not in args.formats:
            models.pop("onnx", None)
            (partial / FILES["onnx"]).unlink(missing_ok=True)
        student.config.save_pretrained(partial)
        texts.collate.tokenizer.save_pretrained(partial)
        results = {
            "student": args.student,
            "teacher": args.teacher,
            "task": data.name,
            "data": {"fingerprint": data.fingerprint},
            "primary_metric": data.primary_metric,
            "models": measured(models, logits, data, partial),
            "command": command(),
            "environment": environment("fp32", "cpu") | {"onnxruntime": onnxruntime.__version__},
        }
        write_json(partial / RECORD, results)
        write_text(partial / "export.md", report(results, student, texts.collate.tokenizer, folder))
    print_rich(*table(results), title=f"{args.student}, exported", below=f"export: {folder}")


def trained(name: str, data: TextData) -> tuple[Any, Texts]:
    """A classifier of the data's labels in fp32, and the data in its tokens."""
    given = load_trained(name, data)
    return given.model.eval(), Texts.of(data, given.tokenizer)


def exported(student: Any, texts: Texts, formats: list[str], folder: Path) -> dict[str, Any]:
    """Writes the files of the formats, and that of `onnx` for `onnx-int8`; returns what is loaded from them."""
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


def said_by(model: Any, texts: Texts) -> dict[str, np.ndarray]:
    """Logits by split, of every labelled split but train."""
    return {split: predict(model, rows, texts.collate) for split, rows in texts.splits.items() if split != "train"}


if __name__ == "__main__":
    run(main)
