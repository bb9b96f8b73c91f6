"""Evaluates a saved classifier on every labelled split but train, and reproduces the metrics of its run.

    python NLP/scripts/evaluate.py runs/NLP/keys_carried/student --dataset intents
    python NLP/scripts/evaluate.py runs/NLP/keys_carried/stages/teacher --dataset new.csv --json metrics.json

The dataset may also be a single file, or have only a test split.
"""

from kd.common.cli import Parser, run, show_help
from kd.nlp.student_model.arguments import add_data_arguments

PARSER = Parser(description=__doc__)
PARSER.add_argument("model", help="Folder or Hub name of a trained classifier.")
add_data_arguments(PARSER)
PARSER.add_argument("--json", metavar="file", help="File to write the metrics to, in addition to printing them.")
if __name__ == "__main__":
    show_help(parser=PARSER)  # before the imports below, which take seconds

from kd.common.reporting.report import show_metrics
from kd.nlp.data.loading import Texts
from kd.nlp.student_model.evaluation import evaluate, load_data_of
from kd.nlp.teacher_model.teacher import load_trained


def main() -> None:
    args = PARSER.parse_args()
    data = load_data_of(args.model, args)
    classifier = load_trained(args.model, data)
    measured, _ = evaluate(args.model, classifier.model, Texts.of(data, classifier.tokenizer))
    show_metrics(args.model, measured, args.json)


if __name__ == "__main__":
    run(main)
