"""Evaluates a saved classifier on each split except train, with the metrics that training reports.

python image-classification/scripts/evaluate.py runs/image-classification/simkd_single/student
python image-classification/scripts/evaluate.py runs/image-classification/teacher --dataset cifar10 --json metrics.json

The flags of the data are those of train_teacher.py: --dataset, --image_column, --validation_share, ... New images may
be in a folder as test/CLASS/NAME.png or CLASS/NAME.png. Their classes are matched with the model's by name, and their
size and normalization are the model's.
"""

from dataclasses import fields

from kd.common.cli import Parser, run, show_help
from kd.image_classification.student_model.arguments import DataArguments

PARSER = Parser([DataArguments], description=__doc__)
PARSER.add_argument(
    "model", help="Folder of a classifier, or of a run (its student if it has one, otherwise its teacher)."
)
PARSER.add_argument("--json", metavar="file", help="Also write the metrics to this file.")
PARSER.add_argument("--import_module", metavar="MODULE", help="Module that defines the model's network.")
if __name__ == "__main__":
    show_help(parser=PARSER)  # before the imports below, which take seconds

from kd.common.reporting.report import show_metrics
from kd.common.utils.errors import UserError
from kd.common.utils.modules import import_named
from kd.image_classification.student_model.evaluation import evaluate
from kd.image_classification.teacher_model.teacher import load_trained, trained_config, trained_folder


def main() -> None:
    args = PARSER.parse_args()
    if args.import_module:
        import_named(args.import_module, f"the network of {args.model}")
    data_args = DataArguments(*(getattr(args, field.name) for field in fields(DataArguments)))

    folder = trained_folder(args.model, student_first=True)
    if folder is None:
        raise UserError(f"no folder {args.model}: pass the folder of a classifier or of a run")
    config = trained_config(folder)
    data_args.image_size = data_args.image_size or config.image_size
    model, data = load_trained(folder, data_args.load(config.label_names))
    entry, _ = evaluate(str(folder), model, data)
    show_metrics(str(folder), entry | {"data_notes": data.notes}, args.json)


if __name__ == "__main__":
    run(main)
