"""Adds texts to a student with counted values, without training: more texts of its classes, or new classes.

    python NLP/scripts/add.py STUDENT --examples new.csv --output_dir larger

STUDENT is a run or a folder, trained with distill_bottleneck.py --values counted --decoder mean. Labels that the
student does not have become new classes, after its others. No other data are needed. forget.py is the inverse.
"""

from kd.common.cli import Parser, run, show_help
from kd.common.training.arguments import add_changed_student_arguments
from kd.nlp.student_model.arguments import add_data_arguments

PARSER = Parser(description=__doc__)
add_changed_student_arguments(PARSER)
add_data_arguments(PARSER, "--examples", "File of texts with labels, to add.")
if __name__ == "__main__":
    show_help(parser=PARSER)  # before the imports below, which take seconds

from kd.common.bottleneck.changes import add_examples, check_arguments
from kd.common.data.sources import print_notes
from kd.nlp.data.loading import load_text_data
from kd.nlp.student_model.saved_student import SavedTextStudent


def main() -> None:
    args = PARSER.parse_args()
    check_arguments(args)
    student = SavedTextStudent.load(args.model)
    data = load_text_data(args.dataset, args.text_columns, args.label_column, "classification", needs_train=False)
    print_notes(data.name, data.notes)
    student.save(args.output_dir, add_examples(student, student.codes_of(data), data.label_names))


if __name__ == "__main__":
    run(main)
