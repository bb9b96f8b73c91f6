"""Adds images to a student with counted values, without training: more images of its classes, or new classes.

    python image-classification/scripts/add.py STUDENT --examples FOLDER --output_dir larger

STUDENT is a run or a folder, trained with distill_bottleneck.py --values counted --decoder mean or with
train_bottleneck.py --values counted. FOLDER has the images as CLASS/NAME.png. Classes that the student does not have
become new classes, after its others. No other data are needed. forget.py is the inverse.
"""

from kd.common.cli import Parser, run, show_help
from kd.common.training.arguments import add_changed_student_arguments
from kd.image_classification.student_model.data_arguments import add_example_arguments

PARSER = Parser(description=__doc__)
add_changed_student_arguments(PARSER)
add_example_arguments(PARSER, "Images with labels, to add: a folder or file.")
if __name__ == "__main__":
    show_help(parser=PARSER)  # before the imports below, which take seconds

from kd.common.bottleneck.changes import add_examples, check_arguments
from kd.image_classification.student_model.saved_student import SavedImageStudent


def main() -> None:
    args = PARSER.parse_args()
    check_arguments(args)
    student = SavedImageStudent.load(args.model)
    student.save(args.output_dir, add_examples(student, *student.load_examples(args, new_classes=True)))


if __name__ == "__main__":
    run(main)
