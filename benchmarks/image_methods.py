"""What each method of distilling an image classifier costs, and what several on one pass of the teacher save.

    python benchmarks/image_methods.py --teacher resnet56 --student resnet20

A step of KDTrainer on random 32x32 images, for each method alone: blocks of all methods in turn, medians, ratios to
plain KD inside this run. Then some methods side by side, in one training, against the same one after another.
"""

import argparse
import statistics
import tempfile

import torch
from simkd_step import Clock, check_counts, random_data
from transformers import PrinterCallback
from transformers.utils import logging

from kd.common.cli import run
from kd.common.methods import Method, parse_method
from kd.common.training.inference import identity_collate
from kd.common.training.side_by_side import SideBySide, SideBySideObjective
from kd.common.training.trainer import KDTrainer
from kd.image_classification.data.loading import SmallImageData
from kd.image_classification.student_model.arguments import ImageTrainingArguments
from kd.image_classification.student_model.matching import task_spec
from kd.image_classification.student_model.methods import METHODS
from kd.image_classification.teacher_model.classifier import ImageClassifier, frozen, new_classifier

PLAIN = "kd"


def seconds_per_step(
    names: list[str], architecture: str, teacher: ImageClassifier, data: SmallImageData, batch: int, precision: str
) -> float:
    """Of students by these methods, trained side by side; the first step is not counted."""
    students = {name: new_classifier(architecture, data.config) for name in names}
    methods: dict[str, Method] = {
        name: parse_method(name, METHODS, batch=batch)(task_spec(student, teacher, data))
        for name, student in students.items()
    }
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = ImageTrainingArguments(
            output_dir=folder, num_train_epochs=1, per_device_train_batch_size=batch, precision=precision,  # type: ignore[arg-type]
            save_strategy="no", eval_strategy="no", report_to="none", disable_tqdm=True, logging_strategy="no",
            learning_rate=1e-9,  # an untrained teacher's maps are large, and the published weights made for small ones
        )  # fmt: skip
        trainer = KDTrainer(
            model=SideBySide(students).to(memory_format=torch.channels_last),  # type: ignore[call-overload]
            args=args,
            objective=SideBySideObjective({name: method.objective for name, method in methods.items()}),
            features=SideBySide.paths({name: method.features for name, method in methods.items()}),
            teacher=frozen(teacher, args.precision),
            teacher_features={name: path for m in methods.values() for name, path in m.teacher_features.items()},
            train_dataset=data.views(
                "train", torch.device("cuda" if torch.cuda.is_available() else "cpu"), augment=True
            ),
            data_collator=identity_collate,
            callbacks=[clock],
        )
        trainer.pop_callback(PrinterCallback)
        trainer.train()
    return clock.seconds_per_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="resnet56")
    parser.add_argument("--student", default="resnet20")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--together", nargs="+", default=["kd", "dkd", "dist"], choices=list(METHODS))
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=6, help="of each in a block")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    args = parser.parse_args()
    check_counts(args.steps, args.blocks)
    logging.disable_progress_bar()
    torch.manual_seed(0)
    data = random_data(args.batch_size * args.steps)
    teacher = new_classifier(args.teacher, data.config)

    def measure(names: list[str]) -> float:
        return seconds_per_step(names, args.student, teacher, data, args.batch_size, args.precision)

    alone = [{name: measure([name]) for name in dict.fromkeys([PLAIN, *args.methods])} for _ in range(args.blocks)]
    print(f"{'method':12} {'ms a step':>10} {'to kd':>7} {'auxiliary':>15}")
    for name in alone[0]:
        ratio = statistics.median(block[name] / block[PLAIN] for block in alone)
        method = parse_method(name, METHODS, batch=args.batch_size)
        auxiliary = method(task_spec(new_classifier(args.student, data.config), teacher, data)).auxiliary_parameters
        print(f"{name:12} {1000 * statistics.median(b[name] for b in alone):10.0f} {ratio:7.2f} {auxiliary:15,}")
    pairs = [(sum(measure([name]) for name in args.together), measure(args.together)) for _ in range(args.blocks)]
    saved = statistics.median(1 - together / apart for apart, together in pairs)
    print(f"{', '.join(args.together)} side by side take {saved:.0%} less time than one after another")


if __name__ == "__main__":
    run(main)
