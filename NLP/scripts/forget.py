"""Removes classes or training texts from a student with a bottleneck, without training.

    python NLP/scripts/forget.py STUDENT --classes set_alarm --output_dir forgotten
    python NLP/scripts/forget.py STUDENT --examples forget.csv --output_dir forgotten

STUDENT is a run or a folder. With counted values (distill_bottleneck.py --values counted --decoder mean), the values
are then those of a student that never counted these texts; the file has their labels, too. Trained values only
stop predicting a class. Keys and encoder do not change. evaluate.py evaluates the result.
"""

from kd.common.cli import Parser, run, show_help
from kd.common.training.arguments import add_changed_student_arguments
from kd.nlp.student_model.arguments import add_data_arguments

PARSER = Parser(description=__doc__)
add_changed_student_arguments(PARSER)
PARSER.add_argument("--classes", nargs="+", metavar="NAME", help="Classes to forget, instead of texts.")
add_data_arguments(PARSER, "--examples", "File of training texts with labels, to forget.")
if __name__ == "__main__":
    show_help(parser=PARSER)  # before the imports below, which take seconds

from kd.common.bottleneck.changes import check_arguments, forget_classes, forget_examples
from kd.nlp.student_model.evaluation import load_data_of
from kd.nlp.student_model.saved_student import SavedTextStudent


def main() -> None:
    args = PARSER.parse_args()
    check_arguments(args)
    student = SavedTextStudent.load(args.model)
    if args.classes:
        description = forget_classes(student, args.classes)
    else:
        description = forget_examples(student, student.codes_of(load_data_of(student.folder, args)))
    student.save(args.output_dir, description)


if __name__ == "__main__":
    run(main)
