"""Speed of a training step of image distillation, on random 32x32 images of 100 classes.

    python benchmarks/image_training.py simkd
    python benchmarks/image_training.py profile
    python benchmarks/image_training.py methods --teacher resnet56 --student resnet20

`simkd` compares SimKD, ResNet32x4 -> ResNet8x4, with the same step in plain PyTorch: fp32, NCHW, the teacher with its
batch norms, a DataLoader that crops, flips and normalizes single images, and `loss.item()` in each step. It also
relates the FLOPs of a step to the measured rate of a 3x3 bf16 convolution.

`profile` prints the operators that take 1 % or more of the time of a SimKD step and of a KD step of the same networks.

`methods` compares every method with plain KD, and several students that share one teacher pass with the same students
trained one after another.

Compared steps alternate in blocks within one run. The first step of a block is not counted.
"""

import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging

from kd.common.cli import Parser, run
from kd.common.methods import Method, labels_and_soft_targets, parse_method
from kd.common.training.inference import identity_collate
from kd.common.training.side_by_side import SideBySide, SideBySideObjective
from kd.common.training.trainer import KDTrainer
from kd.common.utils.devices import AUTOCAST, resolve_precision, synchronize
from kd.common.utils.ranges import Range
from kd.image_classification.data.image_data import Images, SmallImageData
from kd.image_classification.student_model.arguments import ImageTrainingArguments, SimKDArguments
from kd.image_classification.student_model.matching import task_spec
from kd.image_classification.student_model.methods import METHODS
from kd.image_classification.student_model.simkd import simkd, simkd_student
from kd.image_classification.teacher_model.classifier import ImageClassifier, frozen, new_classifier

CLASSES, SIZE, PADDING = 100, 32, 4
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Clock(TrainerCallback):
    """The mean time of all steps but the first."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            synchronize(DEVICE)
            self.started = time.perf_counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        synchronize(DEVICE)
        self.seconds_per_step = (time.perf_counter() - self.started) / (state.global_step - 1)


def random_data(samples: int) -> SmallImageData:
    pixels = torch.randint(0, 256, (samples, SIZE, SIZE, 3), dtype=torch.uint8)
    images = Images(pixels, torch.randint(CLASSES, (samples,)))
    names = [str(i) for i in range(CLASSES)]
    return SmallImageData(name="random", splits={"train": images, "validation": images}, label_names=names, size=SIZE,
                          mean=[0.5] * 3, std=[0.25] * 3, flip=True, fingerprint="random")  # fmt: skip


def seconds_per_step(
    model: nn.Module, objective: nn.Module, paths: tuple[dict[str, str], dict[str, str]],
    teacher: ImageClassifier | None, data: SmallImageData, args: Namespace, epochs: int = 1, **training: Any,
) -> float:  # fmt: skip
    """Trains `model` with KDTrainer. `paths`: feature paths of student and teacher."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        training_args = ImageTrainingArguments(
            output_dir=folder, num_train_epochs=epochs, per_device_train_batch_size=args.batch_size,
            precision=args.precision, save_strategy="no", eval_strategy="no", logging_strategy="no", report_to="none",
            disable_tqdm=True, **training,
        )  # fmt: skip
        trainer = KDTrainer(
            model=model.to(memory_format=torch.channels_last),  # type: ignore[call-overload]
            args=training_args,
            objective=objective,
            features=paths[0],
            teacher=teacher and frozen(teacher, training_args.precision),
            teacher_features=paths[1],
            train_dataset=data.views("train", DEVICE, augment=True),
            data_collator=identity_collate,
            callbacks=[clock],
        )
        trainer.pop_callback(PrinterCallback)
        trainer.train()
        trainer.finish()
    return clock.seconds_per_step


# ---- SimKD against plain PyTorch ----


class PlainImages(torch.utils.data.Dataset):
    """Augments one image at a time."""

    def __init__(self, data: SmallImageData) -> None:
        self.images = data.splits["train"]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        image = self.images.pixels[i].permute(2, 0, 1).float() / 255
        size, image = image.shape[-1], F.pad(image, (PADDING,) * 4)
        top, left = (int(torch.randint(2 * PADDING + 1, ())) for _ in range(2))
        image = image[:, top : top + size, left : left + size]
        image = image.flip(-1) if torch.rand(()) < 0.5 else image
        return (image - 0.5) / 0.25, self.images.labels[i]


def plain_seconds(
    student: ImageClassifier, teacher: ImageClassifier, data: SmallImageData, batch: int, workers: int = 0
) -> float:
    """Seconds per step over one epoch of plain PyTorch, without the first step. `workers`: of the DataLoader."""
    loader = torch.utils.data.DataLoader(
        PlainImages(data), batch, shuffle=True, drop_last=True, num_workers=workers, pin_memory=DEVICE.type == "cuda"
    )
    assert student.projector is not None
    student, features = student.to(DEVICE).train(), teacher.to(DEVICE).backbone.eval()  # type: ignore[arg-type]
    backbone, projector = student.backbone, student.projector
    optimizer = torch.optim.SGD([*backbone.parameters(), *projector.parameters()], 0.05, 0.9, weight_decay=5e-4)
    total = started = 0.0
    for images, _ in loader:
        images = images.to(DEVICE, non_blocking=True)
        with torch.no_grad():
            target = features(images.contiguous())
        loss = F.mse_loss(projector(backbone(images)), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()  # waits for a GPU
        started = started or time.perf_counter()
    return (time.perf_counter() - started) / (len(loader) - 1)


def convolution_rate(dtype: torch.dtype) -> float:
    """FLOPs per second of a 3x3 convolution of 256 to 256 channels on 32 maps of 32x32, channels_last."""
    conv = nn.Conv2d(256, 256, 3, padding=1, bias=False).to(DEVICE, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(32, 256, 32, 32, device=DEVICE, dtype=dtype).to(memory_format=torch.channels_last)
    with torch.no_grad():
        seconds = [timed(lambda: conv(x)) for _ in range(8)]
    return 2 * 32 * 32 * 32 * 256 * 256 * 9 / min(seconds)


def timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    synchronize(DEVICE)
    return time.perf_counter() - started


def flops_per_image(student: ImageClassifier, teacher: ImageClassifier) -> float:
    """FLOPs of the teacher's forward, and of the student's forward and backward."""
    x = torch.randn(2, 3, SIZE, SIZE)
    with FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            target = teacher.eval()(x).features["map"]
        F.mse_loss(student.train()(x).features["map"], target).backward()
    return counter.get_total_flops() / 2


def compare_simkd(args: Namespace, data: SmallImageData) -> None:
    teacher = new_classifier("resnet32x4", data.config)
    precision = resolve_precision(args.precision, DEVICE)
    plain, ours = [], []
    for _ in range(args.blocks):
        plain.append(plain_seconds(simkd_student("resnet8x4", teacher, data, 2), teacher, data, args.batch_size))
        student = simkd_student("resnet8x4", teacher, data, 2)
        method = simkd(student, teacher, SimKDArguments(), temperature=4.0)
        paths = method.features, method.teacher_features
        compiled = {"torch_compile": args.torch_compile}
        ours.append(seconds_per_step(student, method.objective, paths, teacher, data, args, **compiled))
    for name, seconds in (("plain, fp32", plain), (f"this project, {precision}", ours)):
        images = [args.batch_size / s for s in seconds]
        print(f"{name:24} {statistics.median(images):7.1f} images/s  ({min(images):.1f} to {max(images):.1f})")
    print(f"ratio {statistics.median(p / o for p, o in zip(plain, ours, strict=True)):.2f}")
    flops = args.batch_size * flops_per_image(simkd_student("resnet8x4", teacher, data, 2), teacher)
    reached = flops / statistics.median(ours)
    rates = {name: convolution_rate(AUTOCAST.get(name, torch.float32)) for name in ("fp32", precision)}
    print(
        f"{flops / 1e9:.0f} GFLOP a step, {reached / 1e9:.0f} GFLOP/s: {reached / rates[precision]:.0%} of a 3x3 "
        f"convolution's {rates[precision] / 1e9:.0f} in {precision} on {torch.get_num_threads()} threads, which is "
        f"{rates[precision] / rates['fp32']:.2f} times its {rates['fp32'] / 1e9:.0f} in fp32"
    )


# ---- operators of a step ----


def profile_steps(args: Namespace, data: SmallImageData) -> None:
    teacher = new_classifier("resnet32x4", data.config)
    student, plain = simkd_student("resnet8x4", teacher, data, 2), new_classifier("resnet8x4", data.config)
    cases = {
        "simkd": (student, simkd(student, teacher, SimKDArguments(), temperature=4.0)),
        "kd": (plain, labels_and_soft_targets(alpha=0.1, temperature=4.0)),
    }
    for name, (network, method) in cases.items():
        paths = method.features, method.teacher_features
        with torch.profiler.profile(acc_events=True) as profiler:
            seconds_per_step(network, method.objective, paths, teacher, data, args)
        kind = "self_device_time_total" if DEVICE.type == "cuda" else "self_cpu_time_total"
        times = {event.key: getattr(event, kind) for event in profiler.key_averages()}
        shares = {key: spent / sum(times.values()) for key, spent in times.items()}
        largest = sorted((share, key) for key, share in shares.items() if share >= 0.01)
        print(f"{name}: " + ", ".join(f"{key} {share:.1%}" for share, key in reversed(largest)))


# ---- methods against plain KD ----


def methods_seconds(names: list[str], teacher: ImageClassifier, data: SmallImageData, args: Namespace) -> float:
    """Seconds per step of students by these methods that share one teacher pass."""
    students = {name: new_classifier(args.student, data.config) for name in names}
    methods: dict[str, Method] = {
        name: parse_method(name, METHODS, batch=args.batch_size)(task_spec(student, teacher, data))
        for name, student in students.items()
    }
    objective = SideBySideObjective({name: method.objective for name, method in methods.items()})
    features = SideBySide.paths({name: method.features for name, method in methods.items()})
    teacher_features = {name: path for method in methods.values() for name, path in method.teacher_features.items()}
    paths = features, teacher_features
    # The learning rate is low, because maps of an untrained teacher are too large for the published weights.
    return seconds_per_step(SideBySide(students), objective, paths, teacher, data, args, learning_rate=1e-9)


def compare_methods(args: Namespace, data: SmallImageData) -> None:
    teacher = new_classifier(args.teacher, data.config)
    names = dict.fromkeys(["kd", *args.methods])
    blocks = [{name: methods_seconds([name], teacher, data, args) for name in names} for _ in range(args.blocks)]
    print(f"{'method':12} {'ms a step':>10} {'to kd':>7} {'auxiliary':>15}")
    for name in names:
        ratio = statistics.median(block[name] / block["kd"] for block in blocks)
        method = parse_method(name, METHODS, batch=args.batch_size)
        auxiliary = method(task_spec(new_classifier(args.student, data.config), teacher, data)).auxiliary_parameters
        print(f"{name:12} {1000 * statistics.median(b[name] for b in blocks):10.0f} {ratio:7.2f} {auxiliary:15,}")
    saved = []
    for _ in range(args.blocks):
        separate = sum(methods_seconds([name], teacher, data, args) for name in args.together)
        saved.append(1 - methods_seconds(args.together, teacher, data, args) / separate)
    share = statistics.median(saved)
    print(f"{', '.join(args.together)} side by side take {share:.0%} less time than one after another")


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("comparison", choices=["simkd", "profile", "methods"])
    parser.add_argument("--batch_size", type=int, default=64, within=Range(1), help="Images per step.")
    parser.add_argument("--steps", type=int, default=12, within=Range(2), help="Steps per block.")
    parser.add_argument("--blocks", type=int, default=3, within=Range(1), help="Number of blocks per step.")
    parser.add_argument(
        "--precision", choices=["auto", "fp32", "bf16"], default="auto", help="Precision of this project's step."
    )
    parser.add_argument("--torch_compile", action="store_true", help="simkd: compile the student of this project.")
    parser.add_argument("--teacher", default="resnet56", help="methods: architecture of the teacher.")
    parser.add_argument("--student", default="resnet20", help="methods: architecture of the student.")
    parser.add_argument(
        "--methods", nargs="+", default=list(METHODS), choices=list(METHODS), help="methods: methods to measure."
    )
    parser.add_argument("--together", nargs="+", default=["kd", "dkd", "dist"], choices=list(METHODS),
                        help="methods: methods whose students share one teacher pass.")  # fmt: skip
    args = parser.parse_args()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    data = random_data(args.batch_size * args.steps)
    {"simkd": compare_simkd, "profile": profile_steps, "methods": compare_methods}[args.comparison](args, data)


if __name__ == "__main__":
    run(main)
