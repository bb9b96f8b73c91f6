"""Evaluates the student of a run, or any saved classifier, on each split except train.

    python image-classification/scripts/evaluate.py runs/image-classification/simkd_single
    python image-classification/scripts/evaluate.py runs/image-classification/simkd_single --dataset FOLDER \\
        --predictions predictions.csv
    python image-classification/scripts/evaluate.py runs/image-classification/teacher --json metrics.json

Without --dataset, the data are those of the run, and the metrics those of its report. Of several seeds, the student of
the first one is evaluated; RUN/seed1 names that of another. New images may be in a folder as test/CLASS/NAME.png or
CLASS/NAME.png. Their classes are matched with the model's by name, and their size and normalization are the model's.
"""

from dataclasses import fields

from kd.common.cli import Parser, run, show_help
from kd.common.training.arguments import add_evaluation_arguments
from kd.image_classification.student_model.data_arguments import (
    EVALUATION_DATA,
    DataArguments,
)

PARSER = Parser([DataArguments], description=__doc__)
add_evaluation_arguments(PARSER, "or the folder of a classifier", "the row, file, label, prediction and probability")
PARSER.add_argument("--import_module", metavar="MODULE", help="Module that defines the model's network.")
if __name__ == "__main__":
    show_help(parser=PARSER)  # before the imports below, which take seconds

from kd.common.reporting.saved_models import (
    parse_with_recipe,
    saved_model,
    show_metrics,
    write_predictions,
)
from kd.common.utils.errors import UserError
from kd.common.utils.modules import import_named
from kd.image_classification.student_model.bottleneck import BottleneckProbeConfig
from kd.image_classification.student_model.evaluation import evaluate, prediction_columns
from kd.image_classification.teacher_model.classifier import ImageClassifierConfig
from kd.image_classification.teacher_model.teacher import load_trained, trained_config, trained_folder

KINDS = ImageClassifierConfig, BottleneckProbeConfig


def main() -> None:
    args = parse_with_recipe(PARSER, EVALUATION_DATA)
    if args.import_module:
        import_named(args.import_module, f"the network of {args.model}")
    data_args = DataArguments(*(getattr(args, field.name) for field in fields(DataArguments)))

    folder = trained_folder(saved_model(args.model))
    if folder is None:
        raise UserError(f"no folder {args.model}: pass the folder of a classifier or of a run")
    config = trained_config(folder, KINDS)
    data_args.image_size = data_args.image_size or config.image_size
    model, data = load_trained(folder, data_args.load(config.label_names), kinds=KINDS)
    entry, logits = evaluate(str(folder), model, data)
    show_metrics(str(folder), entry | {"data_notes": data.notes}, args.json)
    write_predictions(args.predictions, prediction_columns(data, logits))


if __name__ == "__main__":
    run(main)
