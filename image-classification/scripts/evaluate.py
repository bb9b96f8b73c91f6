"""Measures a saved classifier on every split but train, exactly as the run that made it did.

python image-classification/scripts/evaluate.py runs/image-classification/simkd_single/student
python image-classification/scripts/evaluate.py runs/image-classification/teacher --dataset cifar10 --json metrics.json
"""

import json

from rich.console import Console
from rich.table import Table

from common.cli import Parser, run
from common.utils.errors import UserError
from common.utils.files import write_text
from image_classification.data.loading import load_image_data
from image_classification.student_model.evaluation import evaluate
from image_classification.teacher_model.teacher import load_trained, trained_folder


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("model", help="folder of a classifier, or of the run that trained it")
    parser.add_argument("--dataset", default="digits", help="known name, Hub name or local folder")
    parser.add_argument("--image_column")
    parser.add_argument("--label_column")
    parser.add_argument("--image_size", type=int)
    parser.add_argument("--validation_share", type=float, default=0.1)
    parser.add_argument("--json", help="also write the metrics to this file")
    args = parser.parse_args()

    folder = trained_folder(args.model)
    if folder is None:
        raise UserError(f"no folder {args.model}: give that of a classifier, or of a run")
    data = load_image_data(args.dataset, args.image_column, args.label_column, args.image_size, args.validation_share)
    model, data = load_trained(folder, data)
    measured, _ = evaluate(str(folder), model, data)

    table = Table("split", "metric", "value", title=str(folder))
    for split, metrics in measured["metrics"].items():
        for name, value in metrics.items():
            table.add_row(split, name, f"{value:.6f}")
    Console().print(table)
    if args.json:
        write_text(args.json, json.dumps(measured, indent=2))


if __name__ == "__main__":
    run(main)
