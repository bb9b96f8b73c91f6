"""Evaluates a saved classifier on each split except train, with the metrics that training reports.

python image-classification/scripts/evaluate.py runs/image-classification/simkd_single/student
python image-classification/scripts/evaluate.py runs/image-classification/teacher --dataset cifar10 --json metrics.json

The flags of the data are those of train_teacher.py: --dataset, --image_column, --validation_share, ... New images may
be in a folder as test/CLASS/NAME.png or CLASS/NAME.png. Their classes are matched with the model's by name, and their
size and normalization are the model's.
"""

from dataclasses import replace

from kd.common.cli import Parser, parse, run
from kd.common.reporting.report import show_metrics
from kd.common.utils.errors import UserError
from kd.image_classification.student_model.arguments import DataArguments
from kd.image_classification.student_model.evaluation import evaluate
from kd.image_classification.teacher_model.teacher import load_trained, trained_config, trained_folder


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "model", help="folder of a classifier, or of a run, whose student (or teacher, if it has none) is evaluated"
    )
    parser.add_argument("--json", help="also write the metrics to this file")
    args, data_words = parser.parse_known_args()
    (data_args,) = parse(DataArguments, argv=data_words)

    folder = trained_folder(args.model, student_first=True)
    if folder is None:
        raise UserError(f"no folder {args.model}: pass the folder of a classifier or of a run")
    config = trained_config(folder)
    data_args = replace(data_args, image_size=data_args.image_size or config.image_size)
    model, data = load_trained(folder, data_args.load(config.label_names))
    entry, _ = evaluate(str(folder), model, data)
    show_metrics(str(folder), entry | {"data_notes": data.notes}, args.json)


if __name__ == "__main__":
    run(main)
