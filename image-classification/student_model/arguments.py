"""Arguments that all image scripts share."""

from dataclasses import dataclass, field
from typing import Any, Literal

from kd.common.cli import reject_unused
from kd.common.data.sources import print_notes
from kd.common.training.arguments import KDTrainingArguments
from kd.common.utils.errors import UserError
from kd.common.utils.ranges import Count, Positive, Share, ShareBelow1
from kd.image_classification.data.loading import ImageData, load_image_data
from kd.image_classification.student_model.pairs import PAIRS, PAIRS_BY_NAME, learning_rate
from kd.image_classification.teacher_model.teacher import trained_folder


@dataclass
class DataArguments:
    """The images."""

    dataset: str = field(
        default="digits", metadata={"help": "digits, cifar10, cifar100, mnist, imagenet, a Hub name or a folder"}
    )
    image_column: str | None = None
    label_column: str | None = None
    image_size: Count | None = field(
        default=None, metadata={"help": "height and width in pixels; above 64 training images are random crops"}
    )
    validation_share: ShareBelow1 = field(
        default=0.1, metadata={"help": "share of train that becomes validation where there is none"}
    )
    max_train_samples: Count | None = field(
        default=None, metadata={"help": "number of training images, always the same"}
    )

    def load(self, label_names: list[str] | None = None) -> ImageData:
        """Prints what was left out or inferred. `label_names`: the classes of a model that is to be measured."""
        data = load_image_data(
            self.dataset,
            self.image_column,
            self.label_column,
            self.image_size,
            self.validation_share,
            self.max_train_samples,
            label_names,
        )
        print_notes(data.name, data.notes)
        return data


@dataclass
class PairArguments:
    """Teacher and student."""

    pair: str | None = field(
        default=None,
        metadata={
            "help": "a pair of the CIFAR-100 tables, as resnet32x4_vgg8: sets --dataset, --teacher, --student, "
            "--method_args and, where published, --learning_rate"
        },
    )
    teacher: str = field(
        default="resnet32x4", metadata={"help": "folder of a trained classifier, or an architecture to train first"}
    )
    teacher_epochs: Positive | None = field(default=None, metadata={"help": "default: as many as the student's"})
    student: str = field(default="resnet8x4", metadata={"help": "architecture: resnet8x4, vgg8, timm:NAME, ..."})
    method_args: list[str] = field(
        default_factory=list,
        metadata={
            "help": "method arguments for this pair, each NAME:argument=value:..., where --method leaves them open"
        },
    )

    def apply_pair(self, data: DataArguments, training: "ImageTrainingArguments") -> None:
        """Sets what `--pair` stands for, except for flags of the command line. Raises UserError for an unknown one."""
        if self.pair is None:
            return
        if self.pair not in PAIRS_BY_NAME:
            raise UserError(f"unknown --pair {self.pair}: choose from {', '.join(PAIRS_BY_NAME)}")
        teacher, student = PAIRS_BY_NAME[self.pair]
        settings, rate = PAIRS[teacher, student], learning_rate(student)
        _set_defaults(self, teacher=teacher, student=student, method_args=settings)
        _set_defaults(data, dataset="cifar100")
        if rate is not None:
            _set_defaults(training, learning_rate=rate)
        self.pair = None  # the saved recipe has the flags that it stands for

    def check_unused_flags(self) -> None:
        if "teacher_epochs" in vars(self)["explicit_flags"] and trained_folder(self.teacher):
            reject_unused(f"teacher {self.teacher} is trained already", self, "teacher_epochs")


def _set_defaults(arguments: Any, **values: Any) -> None:
    for name, value in values.items():
        if name not in vars(arguments)["explicit_flags"]:
            setattr(arguments, name, value)


@dataclass
class ImageTrainingArguments(KDTrainingArguments):
    """Training with the defaults of image classifiers: SGD with momentum, one cycle of the learning rate."""

    output_dir: str | None = field(default=None, metadata={"help": "default: runs/image-classification/METHOD"})
    num_train_epochs: float = field(default=50, metadata={"help": "of the student, and of its control"})
    per_device_train_batch_size: int = 64
    per_device_eval_batch_size: int = 250
    learning_rate: float = 0.05
    optim: str = "sgd"
    optim_args: str | None = "momentum=0.9,nesterov=true"
    weight_decay: float = 5e-4
    max_grad_norm: float = field(default=0.0, metadata={"help": "clip gradients to that norm; 0: not at all"})
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = field(default=0.2, metadata={"help": "steps, or below 1 a share of all steps"})
    train_sampling_strategy: Literal["random", "sequential"] = "random"  # all images are of one size
    dataloader_drop_last: bool = field(default=True, metadata={"help": "training batches of one size only"})
    dataloader_pin_memory: bool = False  # small images lie on the device already
    strong_augmentation: bool = field(
        default=False, metadata={"help": "show each image of a batch a second time, under RandAugment and cutout"}
    )
    alpha: Share = field(default=0.1, metadata={"help": "weight of the labels' loss; the soft targets get 1 - alpha"})
    temperature: Positive = field(default=4.0, metadata={"help": "softens teacher's and student's logits alike"})

    @property
    def views(self) -> int:
        """Of each image in a batch."""
        return 2 if self.strong_augmentation else 1

    def __post_init__(self) -> None:
        if self.label_smoothing_factor:
            raise ValueError("--label_smoothing_factor is not supported for image classifiers: leave it at 0")
        output_dir = self.output_dir
        super().__post_init__()
        self.output_dir = output_dir  # None: the script knows a better name than the parent's
