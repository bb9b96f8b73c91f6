"""Data on which a saved classifier is measured: in its labels, and without need of a train split."""

from argparse import ArgumentParser, Namespace

from kd.common.data.labels import Kind
from kd.common.data.sources import print_notes
from kd.nlp.data.loading import TextData, load_text_data
from kd.nlp.teacher_model.teacher import classifies, own_label_names, read_config


def add_data_flags(parser: ArgumentParser) -> None:
    """The flags that `load` reads."""
    parser.add_argument("--dataset", required=True, help="embedded name, Hub name[:config], local folder or file")
    parser.add_argument("--text_columns", nargs="+", help="one column, or two for pairs")
    parser.add_argument("--label_column")


def load(model: str, args: Namespace) -> TextData:
    """The data of the flags in the labels of `model`, a folder or Hub name; prints what was inferred of them.

    Raises UserError where the data have other labels.
    """
    kind, labels = labels_of(model)
    data = load_text_data(args.dataset, args.text_columns, args.label_column, kind, labels, needs_train=False)
    print_notes(data.name, data.notes)
    return data


def labels_of(model: str) -> tuple[Kind | None, list[str] | None]:
    """What a classifier predicts: classes with their names, in the order of its outputs, or scores. Of what is no
    classifier, or names its outputs LABEL_0 and so on, nothing is known.
    """
    config = read_config(model)
    if not classifies(config):
        return None, None
    if config.num_labels == 1:
        return "regression", None
    return "classification", own_label_names(model, config)
