"""Evaluates a saved classifier on every split except train, with the same metrics as the run that trained it.

    python example-domain/scripts/evaluate.py runs/example-domain/distill/student
    python example-domain/scripts/evaluate.py runs/example-domain/distill/stages/teacher

Pass the run's --dataset if it was not the default. --json FILE also writes the metrics to a file.
"""

from kd.common.cli import Parser, run
from kd.common.reporting.report import show_metrics
from kd.example_domain.data.loading import load_data
from kd.example_domain.student_model.distillation import evaluate
from kd.example_domain.teacher_model.classifier import load_trained


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("model", help="Folder of a classifier.")
    parser.add_argument("--dataset", default="tones", help="Dataset on which the model was trained.")
    parser.add_argument("--json", help="File to which the metrics are also written.")
    args = parser.parse_args()

    data = load_data(args.dataset)
    model = load_trained(args.model, data)
    show_metrics(args.model, evaluate(args.model, model, data).entry, args.json)


if __name__ == "__main__":
    run(main)
