"""Removes classes or training texts from a student with a bottleneck, without training.

    python NLP/scripts/forget.py STUDENT --classes set_alarm --output_dir forgotten
    python NLP/scripts/forget.py STUDENT --examples forget.csv --output_dir forgotten

STUDENT is a run or a folder. With counted values (distill_bottleneck.py --values counted --decoder mean), the values
are then those of a student that was never given these texts; the file has their labels, too. Trained values only
stop predicting a class. Keys, encoder and what a teacher taught them do not change. evaluate.py evaluates the result.
"""

from kd.common.cli import Parser, run, show_help
from kd.common.training.arguments import add_forget_arguments
from kd.nlp.student_model.arguments import add_data_arguments

PARSER = Parser(description=__doc__)
add_forget_arguments(PARSER, "texts")
add_data_arguments(PARSER, "--examples", "File of training texts with labels, to forget.")
if __name__ == "__main__":
    show_help(parser=PARSER)  # before the imports below, which take seconds

from datasets import concatenate_datasets
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from kd.common.bottleneck.forgetting import (
    bottleneck_of,
    check_arguments,
    forget_classes,
    forget_examples,
    save_changed,
)
from kd.common.bottleneck.training import CodeDataset, encode_samples
from kd.common.pretrained import load_model, load_tokenizer, reading
from kd.common.reporting.saved_models import saved_model
from kd.common.utils.devices import best_device
from kd.nlp.data.loading import Texts
from kd.nlp.student_model.bottleneck_training import samples_of
from kd.nlp.student_model.evaluation import load_data_of


def main() -> None:
    args = PARSER.parse_args()
    check_arguments(args)
    name = saved_model(args.model)
    with reading(name, "a text classifier"):
        model = load_model(AutoModelForSequenceClassification, name).to(best_device()).eval()
        tokenizer = load_tokenizer(AutoTokenizer, name)
    bottleneck = bottleneck_of(model, name)
    if args.classes:
        description = forget_classes(bottleneck, args.classes, list(model.config.id2label.values()))
    else:
        texts = Texts.of(load_data_of(name, args), tokenizer)
        rows = concatenate_datasets(list(texts.splits.values()))
        samples = samples_of(texts, rows)
        codes = encode_samples(model, rows, texts.collate, "fp32")
        description = forget_examples(bottleneck, CodeDataset(codes, samples.labels, samples.sample_ids))
    save_changed(model, tokenizer, name, args.output_dir, description)


if __name__ == "__main__":
    run(main)
