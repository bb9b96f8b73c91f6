"""A SimKD training step, ResNet32x4 -> ResNet8x4 on 32x32 images: this project against the same step written plainly.

    python benchmarks/simkd_step.py --batch_size 64

Plain: fp32, NCHW, teacher with its batch norms, a DataLoader that crops, flips and normalizes image by image, three
separate modules, `loss.item()` each step. Both train on the same random images; the ratio is taken inside one run,
blocks of either alternating. And the physical side: FLOPs of a step, and what share of this machine's measured
rate for a 3x3 bf16 convolution that is.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback

from kd.common.cli import run
from kd.common.training.inference import identity_collate
from kd.common.training.trainer import KDTrainer
from kd.common.utils.devices import resolve_precision
from kd.common.utils.errors import UserError
from kd.image_classification.data.loading import Images, SmallImageData
from kd.image_classification.student_model.arguments import ImageTrainingArguments
from kd.image_classification.student_model.simkd import SimKDArguments, simkd, simkd_student
from kd.image_classification.teacher_model.classifier import ImageClassifier, frozen, new_classifier

CLASSES, SIZE, PADDING = 100, 32, 4


class Clock(TrainerCallback):
    """Notes when steps end."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())

    @property
    def seconds_per_step(self) -> float:
        return (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)


def check_counts(steps: int, blocks: int) -> None:
    if steps < 2 or blocks < 1:
        raise UserError("--steps must be at least 2, as the first is not counted, and --blocks at least 1")


def random_data(samples: int) -> SmallImageData:
    pixels = torch.randint(0, 256, (samples, SIZE, SIZE, 3), dtype=torch.uint8)
    images = Images(pixels, torch.randint(CLASSES, (samples,)))
    names = [str(i) for i in range(CLASSES)]
    return SmallImageData(name="random", splits={"train": images, "validation": images}, label_names=names, size=SIZE,
                          mean=[0.5] * 3, std=[0.25] * 3, flip=True, fingerprint="random")  # fmt: skip


class PlainImages(torch.utils.data.Dataset):
    """One image at a time, as such scripts have it."""

    def __init__(self, data: SmallImageData) -> None:
        self.images = data.splits["train"]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        image = self.images.pixels[i].permute(2, 0, 1).float() / 255
        image = F.pad(image, (PADDING,) * 4)
        top, left = (int(torch.randint(2 * PADDING + 1, ())) for _ in range(2))
        image = image[:, top : top + SIZE, left : left + SIZE]
        image = image.flip(-1) if torch.rand(()) < 0.5 else image
        return (image - 0.5) / 0.25, self.images.labels[i]


def plain_seconds(student: ImageClassifier, teacher: ImageClassifier, data: SmallImageData, batch: int) -> float:
    """Seconds per step over one epoch."""
    loader = torch.utils.data.DataLoader(PlainImages(data), batch, shuffle=True, drop_last=True)
    assert student.projector is not None
    backbone, projector, features = student.backbone.train(), student.projector.train(), teacher.backbone.eval()
    optimizer = torch.optim.SGD([*backbone.parameters(), *projector.parameters()], 0.05, 0.9, weight_decay=5e-4)
    total, started = 0.0, time.perf_counter()
    for images, _ in loader:
        with torch.no_grad():
            target = features(images.contiguous())
        loss = F.mse_loss(projector(backbone(images)), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    return (time.perf_counter() - started) / len(loader)


def our_seconds(
    student: ImageClassifier,
    teacher: ImageClassifier,
    data: SmallImageData,
    batch: int,
    precision: str,
    compiled: bool,
) -> float:
    """Seconds per step over one epoch of KDTrainer, whose first step (and compilation) is not counted."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    method = simkd(student, teacher, SimKDArguments(), temperature=4.0)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = ImageTrainingArguments(
            output_dir=folder, num_train_epochs=1, per_device_train_batch_size=batch, precision=precision,  # type: ignore[arg-type]
            save_strategy="no", eval_strategy="no", report_to="none", disable_tqdm=True, torch_compile=compiled,
        )  # fmt: skip
        KDTrainer(
            model=student.to(memory_format=torch.channels_last),  # type: ignore[call-overload]
            args=args,
            objective=method.objective,
            features=method.features,
            teacher=frozen(teacher, args.precision),
            teacher_features=method.teacher_features,
            train_dataset=data.views("train", device, augment=True),
            data_collator=identity_collate,
            callbacks=[clock],
        ).train()
    return clock.seconds_per_step


def convolution_rate(dtype: torch.dtype) -> float:
    """FLOPs per second of a 3x3 convolution of 256 to 256 channels on 32 maps of 32x32, channels_last."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    conv = nn.Conv2d(256, 256, 3, padding=1, bias=False).to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(32, 256, 32, 32, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    with torch.no_grad():
        seconds = [timed(lambda: conv(x)) for _ in range(8)]
    return 2 * 32 * 32 * 32 * 256 * 256 * 9 / min(seconds)


def timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def flops_per_image(student: ImageClassifier, teacher: ImageClassifier) -> float:
    """Teacher forward, student forward and backward."""
    x = torch.randn(2, 3, SIZE, SIZE)
    with FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            target = teacher.eval()(x).features["map"]
        F.mse_loss(student.train()(x).features["map"], target).backward()
    return counter.get_total_flops() / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=12, help="of either in each block")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--torch_compile", action="store_true", help="compile this project's student")
    args = parser.parse_args()
    check_counts(args.steps, args.blocks)

    torch.manual_seed(0)
    data = random_data(args.batch_size * args.steps)
    teacher = new_classifier("resnet32x4", data.config)
    precision = resolve_precision(args.precision, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    plain, ours = [], []
    for _ in range(args.blocks):
        plain.append(plain_seconds(simkd_student("resnet8x4", teacher, data, 2), teacher, data, args.batch_size))
        student = simkd_student("resnet8x4", teacher, data, 2)
        ours.append(our_seconds(student, teacher, data, args.batch_size, precision, args.torch_compile))
    per_image = flops_per_image(simkd_student("resnet8x4", teacher, data, 2), teacher)
    rates = {name: convolution_rate(dtype) for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))}
    for name, seconds in (("plain, fp32", plain), (f"this project, {precision}", ours)):
        images = [args.batch_size / s for s in seconds]
        print(f"{name:24} {statistics.median(images):7.1f} images/s  ({min(images):.1f} to {max(images):.1f})")
    print(f"ratio {statistics.median(p / o for p, o in zip(plain, ours, strict=True)):.2f}")
    reached = per_image * args.batch_size / statistics.median(ours)
    own, plain_rate = rates[precision], rates["fp32"]
    print(
        f"{per_image * args.batch_size / 1e9:.0f} GFLOP a step, {reached / 1e9:.0f} GFLOP/s: {reached / own:.0%} of a "
        f"3x3 convolution's {own / 1e9:.0f} in {precision} on {torch.get_num_threads()} threads, which is "
        f"{own / plain_rate:.2f} times its {plain_rate / 1e9:.0f} in fp32"
    )


if __name__ == "__main__":
    run(main)
