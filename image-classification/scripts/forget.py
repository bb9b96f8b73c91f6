"""Removes classes or training images from a classifier with a bottleneck, without training.

    python image-classification/scripts/forget.py STUDENT --classes cat --output_dir forgotten
    python image-classification/scripts/forget.py STUDENT --examples FOLDER --output_dir forgotten

STUDENT is a run or a folder. With counted values (distill_bottleneck.py --values counted --decoder mean, or
train_bottleneck.py --values counted), the values are then those of a student that never counted these images; FOLDER
has them as CLASS/NAME.png. Trained values only stop predicting a class. Keys and encoder do not change.
"""

from kd.common.cli import Parser, run, show_help
from kd.common.training.arguments import add_changed_student_arguments
from kd.image_classification.student_model.data_arguments import add_example_arguments

PARSER = Parser(description=__doc__)
add_changed_student_arguments(PARSER)
PARSER.add_argument("--classes", nargs="+", metavar="NAME", help="Classes to forget, instead of images.")
add_example_arguments(PARSER, "Training images with labels, to forget: a folder or file.")
if __name__ == "__main__":
    show_help(parser=PARSER)  # before the imports below, which take seconds

from kd.common.bottleneck.changes import check_arguments, forget_classes, forget_examples
from kd.image_classification.student_model.saved_student import SavedImageStudent


def main() -> None:
    args = PARSER.parse_args()
    check_arguments(args)
    student = SavedImageStudent.load(args.model)
    if args.classes:
        description = forget_classes(student, args.classes)
    else:
        samples, _ = student.load_examples(args)
        description = forget_examples(student, samples)
    student.save(args.output_dir, description)


if __name__ == "__main__":
    run(main)
