"""Evaluates the student of a run, or any saved classifier, on every split except train.

    python example-domain/scripts/evaluate.py runs/example-domain/distill
    python example-domain/scripts/evaluate.py runs/example-domain/distill --dataset FILE \\
        --predictions predictions.csv
    python example-domain/scripts/evaluate.py runs/example-domain/distill/stages/teacher

Without --dataset, the data are those of the run, and the metrics those of its report. Of several seeds, the student of
the first one is evaluated; RUN/seed1 names that of another.
"""

from kd.common.cli import Parser, run, show_help
from kd.common.training.arguments import add_evaluation_arguments
from kd.common.utils.ranges import MOST, Range

PARSER = Parser(description=__doc__)
add_evaluation_arguments(PARSER, "or the folder of a classifier", "the row, label, prediction and probability")
PARSER.add_argument("--dataset", help="Embedded dataset (tones), Hub name, folder or file (default: that of the run).")
PARSER.add_argument(
    "--max_eval_samples", type=int, within=Range(1, MOST), help="Maximum number of signals in each split."
)
if __name__ == "__main__":
    show_help(parser=PARSER)  # before the imports below, which take seconds

from kd.common.reporting.saved_models import (
    parse_with_recipe,
    saved_model,
    show_metrics,
    write_predictions,
)
from kd.example_domain.data.loading import load_data
from kd.example_domain.student_model.distillation import evaluate, prediction_columns
from kd.example_domain.teacher_model.classifier import load_trained, read_config


def main() -> None:
    args = parse_with_recipe(PARSER, ("dataset", "max_eval_samples"))
    folder = saved_model(args.model)
    names = read_config(folder).label_names
    data = load_data(args.dataset, max_eval_samples=args.max_eval_samples, label_names=names)
    evaluation = evaluate(folder, load_trained(folder, data), data)
    show_metrics(folder, evaluation.entry, args.json)
    write_predictions(args.predictions, prediction_columns(data, evaluation.logits))


if __name__ == "__main__":
    run(main)
