"""Distills a BERT teacher into a smaller student, with or without a discrete key-value bottleneck in either.

    python NLP/scripts/distill_bottleneck.py NLP/scripts/keys_carried.yaml
    python NLP/scripts/distill_bottleneck.py NLP/scripts/base.yaml --dataset clinc_oos --teacher bert-base-uncased

The recipes keys_carried, new_keys, student_only and base are the four systems; `distill_*.sh` name them.
"""

from dataclasses import dataclass, field
from typing import Literal

from common.arguments import KDTrainingArguments
from common.cli import parse, run
from common.filling import Keys
from nlp.data.loading import load_text_data
from nlp.student_model.distillation import Distillation


@dataclass
class Arguments:
    """What is distilled from what, and the shape of the bottleneck."""

    dataset: str = field(default="intents", metadata={"help": "embedded name, Hub name[:config] or local folder"})
    text_columns: list[str] | None = field(default=None, metadata={"help": "one column, or two for pairs"})
    label_column: str | None = None
    max_length: int = field(default=128, metadata={"help": "longer texts are cut, in tokens"})

    teacher: str = field(default="tiny-bert", metadata={"help": "Hub name, local folder, or the embedded tiny-bert"})
    teacher_epochs: float = field(default=6, metadata={"help": "fine-tuning; a teacher of these labels is kept as is"})
    freeze_teacher_encoder: bool = field(default=False, metadata={"help": "train only the teacher's bottleneck"})
    student: str | None = field(default=None, metadata={"help": "Hub name or folder; else cut from the teacher"})
    student_layers: int | None = field(default=None, metadata={"help": "layers of the cut (default: half)"})
    control_from: str | None = field(
        default=None, metadata={"help": "encoder that the control is cut from, where --teacher is trained already"}
    )
    align_epochs: float = field(default=6, metadata={"help": "matching the teacher's hidden states; 0: none"})
    align_learning_rate: float = field(default=5e-4, metadata={"help": "matching bears more than fine-tuning does"})
    scratch_epochs: float = field(default=20, metadata={"help": "--teacher_epochs for random weights (tiny-bert)"})
    scratch_learning_rate: float = field(default=1e-3, metadata={"help": "--learning_rate for random weights"})

    bottleneck: Literal["both", "student", "none"] = field(default="both", metadata={"help": "who has one"})
    keys: Keys = field(default="carried", metadata={"help": "where the student's keys come from"})
    codebooks: int = 32
    pairs: int = field(default=512, metadata={"help": "key-value pairs in a codebook"})
    split: Literal["segment", "projection"] = "segment"
    key_dim: int | None = field(default=None, metadata={"help": "width of a key under the projection split"})
    decoder: Literal["linear", "mean"] = "linear"
    value_dim: int = field(default=16, metadata={"help": "width of a value for the linear decoder"})
    pooling: Literal["mean", "cls", "tokens"] = "mean"
    value_epochs: float = field(default=10, metadata={"help": "epochs over the cached codes"})
    value_batch_size: int = 256

    def __post_init__(self) -> None:
        if self.keys in ("carried", "reused") and self.bottleneck == "student":
            raise ValueError(f"--keys {self.keys} needs a teacher with a bottleneck: --bottleneck both, or --keys new")
        if self.student and self.student_layers:
            raise ValueError("--student names a whole model, --student_layers cuts one from the teacher: choose one")
        if self.bottleneck == "none" and self.pooling != "cls":
            self.pooling = "cls"  # what the head of a plain BERT sees
        if self.freeze_teacher_encoder and self.bottleneck != "both":
            raise ValueError("--freeze_teacher_encoder leaves a plain teacher untrained: it needs --bottleneck both")

    def bottleneck_shape(self) -> dict:
        names = ("codebooks", "pairs", "split", "key_dim", "decoder", "value_dim")
        return {name: getattr(self, name) for name in names}


def main() -> None:
    args, training = parse(Arguments, KDTrainingArguments)
    data = load_text_data(args.dataset, args.text_columns, args.label_column, training.seed)
    distillation = Distillation(args, training, data)
    teacher = distillation.teacher()
    control = None if training.no_control else distillation.control()
    student = distillation.student(teacher)
    distillation.report(teacher, control, student)


if __name__ == "__main__":
    run(main)
