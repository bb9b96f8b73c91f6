"""Measures a saved student or teacher on every labelled split but train, exactly as the run that made it did.

python NLP/scripts/evaluate.py runs/NLP/keys_carried/student --dataset intents
python NLP/scripts/evaluate.py runs/NLP/keys_carried/stages/teacher --dataset intents --json metrics.json
"""

from common.cli import Parser, run
from common.results import show_metrics
from nlp.data.loading import load_text_data
from nlp.student_model.evaluation import evaluate
from nlp.student_model.pipeline import Texts
from nlp.teacher_model.teacher import in_label_order, load_trained


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("model", help="folder or Hub name of a classifier")
    parser.add_argument("--dataset", required=True, help="embedded name, Hub name[:config] or local folder")
    parser.add_argument("--text_columns", nargs="+")
    parser.add_argument("--label_column")
    parser.add_argument("--json", help="also write the metrics to this file")
    args = parser.parse_args()

    data = in_label_order(args.model, load_text_data(args.dataset, args.text_columns, args.label_column))
    classifier = load_trained(args.model, data)
    texts = Texts.of(data, classifier.tokenizer)
    measured, _ = evaluate(args.model, classifier.model, data, texts.splits, texts.collate)
    show_metrics(args.model, measured, args.json)


if __name__ == "__main__":
    run(main)
