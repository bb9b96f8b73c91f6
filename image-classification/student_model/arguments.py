"""Arguments of the image scripts.

This module does not import torch or transformers, so that `--help` is fast.
"""

from argparse import SUPPRESS
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from kd.common.cli import reject_unused
from kd.common.training.arguments import (
    METHOD_NAMES,
    BottleneckArguments,
    CodebookArguments,
    CodebookSize,
    KDTrainingArguments,
    check_ensemble_weights,
    ensemble_weights,
)
from kd.common.utils.errors import UserError
from kd.common.utils.ranges import Count, NotNegative, Positive, Seed, Share, ShareAbove0, ShareBelow1, check_declared
from kd.image_classification.student_model.data_arguments import DataArguments
from kd.image_classification.student_model.pairs import PAIRS, PAIRS_BY_NAME, learning_rate

if TYPE_CHECKING:
    from kd.image_classification.data.image_data import ImageData
    from kd.image_classification.student_model.loaded_teacher import LoadedTeacher

PLAIN, CONTROL, SIMKD = "none", "control", "simkd"  # other values of --method and --methods
CONTROLS = (PLAIN, CONTROL)  # trained on the labels alone, without and with SimKD's projector
# The names in kd.image_classification.student_model.methods.METHODS, which imports torch.
IMAGE_METHODS = (
    *METHOD_NAMES,
    *("fitnet", "attention", "nst", "vid", "srrl", "catkd", "norm", "ofd", "reviewkd", "semckd", "crd"),
)
METHOD_HELP = f"NAME[:argument=value:...]: {PLAIN}, {SIMKD}, {', '.join(IMAGE_METHODS)}."
SGD_ARGS = "momentum=0.9,nesterov=true"
TEACHER_EPOCHS = 3  # times the epochs of a student
PIXELS = "pixels"  # no encoder: the pixels are the embedding
Variant = Literal["single", "multi", "all-layer"]
FeatureLossName = Literal["l2", "kl-channel", "kl-spatial", "cosine"]


@dataclass
class PairArguments:
    """Teacher and student."""

    pair: str | None = field(
        default=None,
        metadata={"help": "CIFAR-100 pair, as resnet32x4_vgg8: sets data, networks, method."},
    )
    teacher: str = field(default="resnet32x4", metadata={"help": "Folder, Hub name, architecture or weights."})
    teacher_architecture: str | None = field(
        default=None, metadata={"help": "Architecture of the weights in --teacher FILE."}
    )
    teacher_weights: str | None = field(default=None, metadata={"help": "File of weights of --teacher NAME."})
    teacher_mean: list[Share] | None = field(
        default=None, metadata={"help": "Mean of the pixels (0 to 1) in the teacher's training."}
    )
    teacher_std: list[Positive] | None = field(default=None, metadata={"help": "Their standard deviation."})
    teacher_accuracy: Share | None = field(
        default=None, metadata={"help": "Accuracy that a loaded teacher must reach, within 0.005."}
    )
    allow_weak_teacher: bool = field(default=False, metadata={"help": "Accept a loaded teacher near chance."})
    import_module: str | None = field(
        default=None, metadata={"help": "Module with the network in the folder of --teacher."}
    )
    teacher_epochs: Positive | None = field(
        default=None,
        metadata={"help": f"Epochs of the teacher (default: {TEACHER_EPOCHS} times --num_train_epochs)."},
    )
    student: str = field(default="resnet8x4", metadata={"help": "Architecture, timm:NAME or module:factory."})
    method_args: list[str] = field(
        default_factory=list,
        metadata={"help": "Arguments that --method does not set: NAME:argument=value:..."},
    )

    def apply_pair(self, data: DataArguments, training: "ImageTrainingArguments") -> None:
        """Sets the arguments of `--pair`, except those on the command line. Raises UserError for an unknown pair."""
        if self.pair is None:
            return
        if self.pair not in PAIRS_BY_NAME:
            raise UserError(f"unknown --pair {self.pair}: choose from {', '.join(PAIRS_BY_NAME)}")
        teacher, student = PAIRS_BY_NAME[self.pair]
        method_args, rate = PAIRS[teacher, student], learning_rate(student)
        _set_defaults(self, teacher=teacher, student=student, method_args=method_args)
        _set_defaults(data, dataset="cifar100")
        if rate is not None:
            _set_defaults(training, learning_rate=rate)
        self.pair = None  # the saved recipe contains the arguments that the pair has set

    def epochs_of_teacher(self, training: "ImageTrainingArguments") -> float:
        """`--teacher_epochs`, by default a multiple of a student's, or as many if `--lr_milestones` apply to both."""
        factor = 1 if training.lr_milestones else TEACHER_EPOCHS
        return self.teacher_epochs or factor * training.num_train_epochs

    def load_teacher(self, data: "ImageData", training: "ImageTrainingArguments") -> "LoadedTeacher":
        """Loads the teacher. One with weights of another project is evaluated.

        Raises UserError for flags without effect, and for a teacher that is worse than the flags require.
        """
        from kd.common.utils.modules import import_named
        from kd.image_classification.student_model.loaded_teacher import LoadedTeacher

        if self.import_module:
            import_named(self.import_module, f"--teacher {self.teacher}")
        return LoadedTeacher.load(self, data, training)


def _set_defaults(arguments: Any, **values: Any) -> None:
    for name, value in values.items():
        if name not in vars(arguments)["explicit_flags"]:
            setattr(arguments, name, value)


@dataclass
class MethodArguments:
    """Method."""

    method: str = field(default="kd", metadata={"help": METHOD_HELP})
    methods: list[str] = field(
        default_factory=list, metadata={"help": "Methods to train side by side on the same batches."}
    )
    ensemble_teachers: list[str] = field(
        default_factory=list,
        metadata={"help": "Folders of more teachers, whose logits are averaged."},
    )
    ensemble_weights: list[Positive] | None = ensemble_weights()
    teacher_views: Path | None = field(
        default=None, metadata={"help": "Folder for a cache of the teacher's logits for every view."}
    )

    def __post_init__(self) -> None:
        check_ensemble_weights(self.ensemble_teachers, self.ensemble_weights)


@dataclass
class SweepArguments:
    """Sweep."""

    methods: list[str] = field(
        default_factory=lambda: [CONTROL, SIMKD],
        metadata={"help": "Methods to train; control is SimKD's network trained on labels alone."},
    )
    projectors: list[str] = field(
        default_factory=lambda: list(get_args(Variant)), metadata={"help": "Projector variants of SimKD."}
    )
    feature_losses: list[str] = field(
        default_factory=lambda: ["l2"],
        metadata={"help": "Feature losses of SimKD: l2, kl-channel, kl-spatial, cosine."},
    )
    learning_rates: list[Positive] = field(
        default_factory=lambda: [0.001, 0.005, 0.01, 0.05, 0.1], metadata={"help": "Learning rates of the students."}
    )

    def __post_init__(self) -> None:
        known = {"projectors": get_args(Variant), "feature_losses": get_args(FeatureLossName)}
        for name in ("methods", "projectors", "feature_losses", "learning_rates"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"--{name} must name at least one value, and none twice, got {values}")
            wrong = [value for value in values if name in known and value not in known[name]]
            if wrong:
                raise ValueError(f"unknown --{name} {wrong[0]!r}: choose from {', '.join(known[name])}")
        check_declared(self)

    def check_unused_flags(self) -> None:
        if SIMKD not in self.methods:
            reject_unused(f"--methods leaves out {SIMKD}", self, "projectors", "feature_losses")


@dataclass
class SimKDWeights:
    """SimKD."""

    projector_factor: Count = field(default=2, metadata={"help": "Channel reduction factor of the projector."})
    projector_ratio: ShareAbove0 = field(
        default=2 / 3, metadata={"help": "Weight of the last map with --projector multi."}
    )
    use_labels: bool = field(
        default=False, metadata={"help": "Match features only where the teacher predicts the label."}
    )
    feature_weight: NotNegative = field(default=5.0, metadata={"help": "Weight of the feature loss."})
    cls_weight: NotNegative = field(default=0.0, metadata={"help": "Weight of the labels' cross-entropy."})
    kl_weight: NotNegative = field(default=1.0, metadata={"help": "Weight of the teacher's soft targets."})

    def __post_init__(self) -> None:
        if not (self.feature_weight or self.cls_weight or self.kl_weight):
            raise ValueError("--feature_weight, --cls_weight and --kl_weight must not all be zero")


@dataclass
class SimKDArguments(SimKDWeights):
    """SimKD. Its feature maps."""

    projector: Variant = field(default="single", metadata={"help": "Feature maps to match."})
    feature_loss: FeatureLossName = field(default="l2", metadata={"help": "Loss between maps."})

    def check_unused_flags(self) -> None:
        if self.projector != "multi":
            reject_unused("--projector is not multi", self, "projector_ratio")


@dataclass
class ImageBottleneckArguments(BottleneckArguments):
    """Discrete key-value bottleneck of an image classifier."""

    codebook_size: CodebookSize = 256
    value_epochs: Positive = 20

    def value_arguments(self, rate: float) -> dict[str, Any]:
        """Training arguments for the values: AdamW, independent of the optimizer of the convolutions."""
        return {
            "dataloader_drop_last": False,
            "optim": "adamw_torch",
            "optim_args": None,
            "weight_decay": 0.0,
            "lr_milestones": None,
            "lr_scheduler_type": "linear",
            "warmup_steps": 0.1,
        } | super().value_arguments(rate)


@dataclass
class IncrementalArguments(CodebookArguments):
    """Encoder and heads.

    The defaults were chosen on MNIST's validation split. The learning rate of the values is large because their
    gradients are divided by the batch size and the number of codebooks. A much larger rate fits the current classes
    better and forgets more. With a very small rate all probabilities stay nearly equal: training then only counts
    samples, and the order of the classes has no effect, not even on a linear probe.
    """

    encoder: str = field(
        default=PIXELS, metadata={"help": "Folder of a trained classifier, or pixels for no encoder."}
    )
    codebooks: Count = 64
    codebook_size: CodebookSize = 256
    key_dim: Count | None = 32
    values: Literal["trained", "counted"] = field(
        default="trained", metadata={"help": "Trained, or counts of labels."}
    )
    classes_per_task: Count = field(default=1, metadata={"help": "Number of classes per task."})
    order_seed: Seed | None = field(
        default=None, metadata={"help": "Random seed for the order of the classes (default: --seed)."}
    )
    value_learning_rate: Positive = field(default=50.0, metadata={"help": "Learning rate of SGD for the values."})
    probe_learning_rate: Positive = field(
        default=0.03, metadata={"help": "Learning rate of SGD for the linear probe."}
    )
    epochs_per_task: Count = field(default=5, metadata={"help": "Number of epochs on the images of each task."})
    batch_size: Count = field(default=64, metadata={"help": "Number of images per step."})

    def check_unused_flags(self) -> None:
        if self.values == "counted":
            reject_unused("--values counted counts labels in one pass", self, "value_learning_rate")

    @property
    def bottleneck(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("codebooks", "codebook_size", "key_dim", "values")}


@dataclass
class ImageTrainingArguments(KDTrainingArguments):
    """Training of image classifiers. The defaults are SGD with momentum and one cycle of the learning rate."""

    output_dir: str | None = field(
        default=None, metadata={"help": "Folder of the run (default: runs/image-classification/METHOD)."}
    )
    num_train_epochs: Positive = 4
    per_device_train_batch_size: Count = 32
    per_device_eval_batch_size: Count = 250
    learning_rate: Positive = 0.1
    optim: str = field(default="sgd", metadata={"help": "Name of the optimizer: sgd, adamw_torch, ..."})
    optim_args: str | None = field(default=None, metadata={"help": f"Arguments of the optimizer (sgd: {SGD_ARGS})."})
    weight_decay: NotNegative = 5e-4
    max_grad_norm: NotNegative = field(default=0.0, metadata={"help": "Maximum gradient norm; 0 for no clipping."})
    lr_scheduler_type: str = "cosine"
    warmup_steps: NotNegative = 0.2
    train_sampling_strategy: Literal["random", "sequential"] = "random"  # all images have the same size
    dataloader_drop_last: bool = True  # training batches of one size
    dataloader_pin_memory: bool = False  # small images are on the device already
    strong_augmentation: bool = field(
        default=False, metadata={"help": "Add a second view of each image, with RandAugment and cutout."}
    )
    alpha: Share = 0.1
    temperature: Positive = 4.0
    label_smoothing_factor: ShareBelow1 = field(default=0.0, metadata={"help": SUPPRESS})  # not supported

    @property
    def views(self) -> int:
        """Number of views of each image in a batch."""
        return 2 if self.strong_augmentation else 1

    def __post_init__(self) -> None:
        if self.label_smoothing_factor:
            raise ValueError("--label_smoothing_factor is not supported for image classifiers: leave it at 0")
        if self.optim == "sgd" and self.optim_args is None:
            self.optim_args = SGD_ARGS
        output_dir = self.output_dir
        super().__post_init__()
        self.output_dir = output_dir  # None until the script sets its default


@dataclass
class StudentTrainingArguments(ImageTrainingArguments):
    """Training of students by any method."""

    dot_delta: NotNegative | None = field(
        default=None, metadata={"help": "DOT: momentum + this for the teacher's gradient, - for the labels'."}
    )


@dataclass
class BottleneckTrainingArguments(ImageTrainingArguments):
    """Training with a bottleneck."""

    value_learning_rate: Positive | None = field(default=None, metadata={"help": "Learning rate of the values."})
