"""Evaluates the student of a run, or any saved classifier or sentence encoder, on every split but train.

    python NLP/scripts/evaluate.py runs/NLP/keys_carried
    python NLP/scripts/evaluate.py runs/NLP/keys_carried --dataset new.csv --predictions predictions.csv
    python NLP/scripts/evaluate.py runs/NLP/keys_carried/stages/teacher --dataset new.csv --json metrics.json

Without --dataset, the data are those of the run, and the metrics those of its report. Of several seeds, the student of
the first one is evaluated; RUN/seed1 names that of another. The dataset may be a single file, or have only a test
split. A sentence encoder is evaluated on pairs of texts with scores; train is then a test split too.

A language model or a translator must be in its run, whose recipe has block size, beams and so on. --text_columns then
names the texts, or prompts and completions, or sources and targets.
"""

from kd.common.cli import Parser, run, show_help
from kd.common.training.arguments import add_evaluation_arguments
from kd.nlp.student_model.arguments import DATA_ARGUMENTS, add_data_arguments

PARSER = Parser(description=__doc__)
add_evaluation_arguments(
    PARSER, "a folder or Hub name of a classifier or a sentence encoder", "the row, label, prediction and probability"
)
add_data_arguments(PARSER)
if __name__ == "__main__":
    show_help(parser=PARSER)  # before the imports below, which take seconds

from kd.common.reporting.saved_models import (
    parse_with_recipe,
    saved_model,
    show_metrics,
    write_predictions,
)
from kd.nlp.student_model.evaluation import evaluate_classifier
from kd.nlp.student_model.generative_evaluation import evaluate_generative, is_generative
from kd.nlp.student_model.sentence_evaluation import evaluate_pairs, is_sentence_encoder
from kd.nlp.teacher_model.teacher import read_config


def main() -> None:
    args = parse_with_recipe(PARSER, DATA_ARGUMENTS)
    model = saved_model(args.model)
    config = read_config(model)
    if is_sentence_encoder(config):
        entry, predictions = evaluate_pairs(model, args)
    elif is_generative(config):
        entry, predictions = evaluate_generative(model, args)
    else:
        entry, predictions = evaluate_classifier(model, args)
    show_metrics(model, entry, args.json)
    write_predictions(args.predictions, predictions)


if __name__ == "__main__":
    run(main)
