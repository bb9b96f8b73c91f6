"""Stores a trained teacher in this repository, so that `--teacher pretrained:NAME` loads it.

    python image-classification/scripts/store_teacher.py runs/image-classification/teacher resnet56_cifar100

The folder image-classification/teacher_model/weights/NAME gets the weights in half precision, the configuration, a
card with the command, data, hardware and metrics, and checksums. Both teachers are evaluated on the data of
the run: the stored one must not be worse by more than 0.05 points.
"""

import re
import shlex
import shutil
from dataclasses import fields
from pathlib import Path

from kd.common.cli import Parser, run, show_help
from kd.image_classification.student_model.data_arguments import (
    EVALUATION_DATA,
    DataArguments,
)

PARSER = Parser([DataArguments], description=__doc__)
PARSER.add_argument("teacher", metavar="RUN", help="Folder of a run of train_teacher.py with one seed.")
PARSER.add_argument("name", metavar="NAME", help="Name of the stored teacher, as resnet56_cifar100.")
if __name__ == "__main__":
    show_help(parser=PARSER)  # before the imports below, which take seconds

from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME

from kd.common.reporting.model_card import without_local_paths
from kd.common.reporting.origins import CARD
from kd.common.reporting.report import metric_table, samples
from kd.common.reporting.results import RESULTS, Results
from kd.common.reporting.saved_models import parse_with_recipe
from kd.common.reporting.tables import code, escaped, fenced, markdown, number, print_rich
from kd.common.utils.errors import UserError
from kd.common.utils.files import read_json, write_text, writing_folder
from kd.image_classification.student_model.evaluation import evaluate
from kd.image_classification.teacher_model.pretrained import WEIGHTS, save_half_precision
from kd.image_classification.teacher_model.teacher import load_trained, trained_config

LARGEST = 4_000_000  # bytes of a file of weights
TOLERANCE = 0.0005  # of the accuracy
Metrics = dict[str, dict[str, float]]  # of each split


def main() -> None:
    args = parse_with_recipe(PARSER, EVALUATION_DATA, "teacher")
    if not re.fullmatch(r"\w+", args.name):
        raise UserError(f"{args.name} is not a name: use letters, digits and underscores")
    run_folder = Path(args.teacher)
    trained, results = run_folder / "stages" / "teacher", read_json(run_folder / RESULTS)
    config = trained_config(trained)
    data_args = DataArguments(*(getattr(args, field.name) for field in fields(DataArguments)))
    data_args.image_size = data_args.image_size or config.image_size
    model, data = load_trained(trained, data_args.load(config.label_names))
    before: Metrics = evaluate(args.name, model, data)[0]["metrics"]

    with writing_folder(WEIGHTS / args.name) as folder:
        for file in (CONFIG_NAME, IMAGE_PROCESSOR_NAME):
            shutil.copyfile(trained / file, folder / file)
        save_half_precision(model, folder)
        after: Metrics = evaluate(args.name, load_trained(folder, data)[0], data)[0]["metrics"]
        check(folder, before, after)
        write_text(folder / CARD, card(args.name, without_local_paths(results, []), after))
    models = {"trained": {"metrics": before}, "stored": {"metrics": after}}
    print_rich(*metric_table({"models": models}), title=str(WEIGHTS / args.name))


def check(folder: Path, before: Metrics, after: Metrics) -> None:
    """Raises UserError if the stored teacher is worse than the trained one, or too large for the repository."""
    for split, metrics in before.items():
        if (accuracy := after[split]["accuracy"]) < metrics["accuracy"] - TOLERANCE:
            raise UserError(
                f"in fp16 the accuracy on {split} is {accuracy:.4f} instead of {metrics['accuracy']:.4f}: the teacher "
                "is not stored"
            )
    for file in folder.iterdir():
        if (size := file.stat().st_size) > LARGEST:
            raise UserError(f"{file.name} has {size:,} bytes, more than {LARGEST:,}: store a smaller teacher")


def card(name: str, results: Results, metrics: Metrics) -> str:
    """The README.md of a stored teacher."""
    teacher, environment = results["models"]["teacher"], results["environment"]
    sections = [
        "---\nlicense: mit\n---",
        f"# {name}",
        f"{code(teacher['name'])}, {teacher['parameters']:,} parameters, trained on the labels of "
        f"{escaped(results['task'])}. `--teacher pretrained:{name}` loads it.",
        markdown(*metric_table({"models": {"teacher": {"metrics": metrics}}})),
        fenced(shlex.join(results["command"])),
        f"Seed {results['seed']}, last epoch. {samples(results)} {number(results['seconds']['teacher'])} seconds of "
        f"training in {environment['precision']} on {escaped(environment['device'])} with {environment['threads']} "
        f"threads and torch {environment['torch']}. Kernels and matrices are stored in fp16. The metrics are those of "
        "the stored weights.",
    ]
    return "\n\n".join(sections) + "\n"


if __name__ == "__main__":
    run(main)
