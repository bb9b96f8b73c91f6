"""Arguments of the data of the image scripts. This module does not import torch or transformers."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from kd.common.cli import Parser, reject_unused
from kd.common.training.arguments import TeacherOutputArguments, only_with
from kd.common.utils.ranges import MOST, Count, Range, ShareBelow1

if TYPE_CHECKING:
    from kd.image_classification.data.image_data import ImageData


@dataclass
class DataArguments:
    """Data."""

    elsewhere: ClassVar = only_with("train_student.py")
    dataset: str = field(
        default="distorted_digits",
        metadata={
            "help": "Dataset: distorted_digits, digits, cifar10, cifar100, mnist, imagenet, Hub name, folder or file."
        },
    )
    image_column: str | None = field(default=None, metadata={"help": "Name of the column with the images."})
    label_column: str | None = field(default=None, metadata={"help": "Name of the column with the labels."})
    image_size: Count | None = field(
        default=None,
        metadata={"help": "Size of the images; above 64, training uses random crops."},
    )
    validation_share: ShareBelow1 = field(
        default=0.1, metadata={"help": "Share of train for a missing validation split."}
    )
    max_train_samples: Count | None = field(default=None, metadata={"help": "Maximum number of training images."})
    max_eval_samples: Count | None = field(
        default=None, metadata={"help": "Maximum number of validation and of test images."}
    )
    unlabelled_label: list[str] | None = field(
        default=None, metadata={"help": "Placeholders for a missing label, such as unknown."}
    )
    drop_unlabelled: bool = field(default=False, metadata={"help": "Leave out training images without a label."})

    def load(self, label_names: list[str] | None = None, keep_unlabelled: bool = True) -> "ImageData":
        """Loads the data and prints notes on what was left out or inferred.

        Args:
            label_names: the classes, by id, of a model to evaluate.
            keep_unlabelled: whether training images without a label may be kept. Raises UserError for an unused flag.
        """
        if not keep_unlabelled:
            reject_unused("images without a label are always left out here", self, "drop_unlabelled")
        from kd.common.data.sources import print_notes
        from kd.image_classification.data.loading import load_image_data

        data = load_image_data(
            self.dataset,
            self.image_column,
            self.label_column,
            self.image_size,
            self.validation_share,
            self.max_train_samples,
            label_names,
            self.max_eval_samples,
            keep_unlabelled and not self.drop_unlabelled and label_names is None,
            unlabelled_label=self.unlabelled_label,
            **self.teacher_options,
        )
        print_notes(data.name, data.notes)
        return data

    @property
    def teacher_options(self) -> dict[str, Any]:
        """Further arguments of `load_image_data`."""
        return {}


@dataclass
class PairDataArguments(DataArguments):
    """Data."""

    label_names: list[str] | None = field(
        default=None, metadata={"help": "Labels, by id, of a teacher that does not name them."}
    )
    trust_label_order: bool = field(
        default=False, metadata={"help": "Such a teacher has the labels of the data, in their order."}
    )

    def __post_init__(self) -> None:
        if self.label_names and self.trust_label_order:
            raise ValueError("--label_names and --trust_label_order both order the labels: pass one of them")

    @property
    def teacher_options(self) -> dict[str, Any]:
        return {"model_labels": self.label_names, "trust_label_order": self.trust_label_order}


@dataclass
class TeacherColumnArguments(TeacherOutputArguments, PairDataArguments):
    """Data."""

    @property
    def teacher_options(self) -> dict[str, Any]:
        columns = {"teacher_columns": self.teacher_columns, "teacher_values": self.teacher_values}
        return super().teacher_options | columns


# The arguments with which the data of a run are evaluated; the model has the size of the images.
EVALUATION_DATA = (
    *("dataset", "image_column", "label_column", "validation_share", "max_eval_samples", "unlabelled_label"),
)


def add_example_arguments(parser: Parser, help: str) -> None:
    """Adds the arguments of scripts that change a student by images."""
    parser.add_argument("--examples", dest="dataset", help=help)
    parser.add_argument("--image_column", help="Name of the column with the images (default: inferred).")
    parser.add_argument("--label_column", help="Name of the column with the labels (default: inferred).")
    size = "Resize the images to the size in training (default: they must have the student's)."
    parser.add_argument("--image_size", type=int, within=Range(1, MOST), help=size)
