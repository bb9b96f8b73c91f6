"""Distillation on CIFAR-100 on one GPU, in minutes: accuracies, images per second, and agreement with the CPU.

On a machine with the data and requirements.txt, write two files of less than 50 MB each, which hold all images:

    python benchmarks/gpu.py --write_data gpu-data --dataset cifar100

On the machine with the GPU, which needs a checkout, torch, numpy, safetensors, transformers and accelerate:

    python benchmarks/gpu.py --data gpu-data --output gpu.json

The parts run in this order:

agreement: a forward pass and a training step in fp32 without TF32, on the GPU and on the CPU.

speed: images per second of a SimKD step in plain PyTorch, with this project's trainer, and as a CUDA graph.

teacher, control, kd, simkd_control, simkd: trained by this project's trainer; test accuracy after the last epoch.

compiled: images per second of the trainer with --torch_compile.

The results are written after each part. A part that fails does not stop the others. A part that would not finish
within --minutes is skipped.
"""

import json
import shutil
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent / "typings"))  # kd, if it is not installed

from kd.common.cli import Parser, run
from kd.common.utils.errors import UserError
from kd.common.utils.files import write_text
from kd.common.utils.ranges import Range

EINOPS = "einops.zip"
FILES = ("images_1.safetensors", "images_2.safetensors")
STUDENTS = ("control", "kd", "simkd_control", "simkd")
PARTS = ("agreement", "speed", "teacher", *STUDENTS, "compiled")
COMPILATION = 60.0  # seconds, an estimate
STARTED = time.perf_counter()  # before torch is imported
Figures = dict[str, Any]


def write_data(folder: Path, dataset: str) -> None:
    """Writes the images of a dataset into FILES, and einops, which is pure Python, into EINOPS."""
    import einops
    import torch
    from packed_images import pack
    from safetensors.torch import save_file

    from kd.image_classification.data.image_data import SmallImageData
    from kd.image_classification.data.loading import load_image_data

    data = load_image_data(dataset, validation_share=0)
    if not isinstance(data, SmallImageData) or data.splits["train"].pixels.shape[-1] != 3:
        raise UserError(f"--dataset {dataset} has no color images of at most 64 pixels: pass another")
    folder.mkdir(parents=True, exist_ok=True)
    described = ("name", "label_names", "mean", "std", "size", "flip", "fingerprint")
    about: Figures = {name: getattr(data, name) for name in described}
    about["splits"] = {split: len(images) for split, images in data.splits.items()}
    pixels, labels = (torch.cat([getattr(i, part) for i in data.splits.values()]) for part in ("pixels", "labels"))
    parts = zip(FILES, pixels.chunk(len(FILES)), labels.chunk(len(FILES)), strict=True)
    for file, some_pixels, some_labels in parts:
        tensors = pack(some_pixels) | {"labels": some_labels.short()}
        save_file(tensors, folder / file, metadata={"about": json.dumps(about)})
        print(f"{folder / file}: {len(some_pixels):,} images, {(folder / file).stat().st_size / 1e6:.1f} MB")
    package = Path(einops.__file__).parent
    shutil.make_archive(str(folder / EINOPS.removesuffix(".zip")), "zip", package.parent, package.name)


class Parts:
    """Runs the parts, and writes the results after each of them."""

    def __init__(self, output: Path, minutes: float, skip: list[str], about: Figures) -> None:
        self.output, self.budget, self.skip = output, 60 * minutes, skip
        self.results: Figures = {"about": about}
        self.failed = False

    def run(self, name: str, part: Callable[[], Figures], needs: float = 0.0) -> Figures | None:
        """The figures of a part, or None if it failed, or was left out for --skip or for lack of time.

        Args:
            needs: seconds that the part takes at least.
        """
        started = time.perf_counter()
        passed = started - STARTED
        if name in self.skip:
            figures: Figures = {"skipped": "--skip"}
        elif passed + needs > self.budget:
            figures = {"skipped": f"{passed:.0f} s have passed, and the part needs at least {needs:.0f}"}
        else:
            try:
                figures = part()
            except Exception as error:  # the other parts can still run
                traceback.print_exc()
                figures, self.failed = {"error": f"{type(error).__name__}: {error}"}, True
            figures["seconds"] = round(time.perf_counter() - started, 2)
        self.results[name] = figures
        self.results["about"]["seconds"] = round(time.perf_counter() - STARTED, 2)
        write_text(self.output, json.dumps(self.results, indent=1) + "\n")
        print(f"{name}: {json.dumps(figures)}", flush=True)
        return None if {"skipped", "error"} & figures.keys() else figures


def run_parts(args: Namespace) -> bool:
    """Runs all parts. Returns whether none failed, and GPU and CPU agree."""
    import gpu_parts

    parts = Parts(args.output, args.minutes, args.skip, gpu_parts.about(args))
    gpu = gpu_parts.Gpu(args)
    if parts.run("data", gpu.read_data) is None:
        return False
    agreement = parts.run("agreement", gpu.agreement)
    speed = parts.run("speed", gpu.speed)
    if parts.run("teacher", gpu.train_teacher, gpu.training_seconds(speed, "teacher")) is not None:
        for name in STUDENTS:
            parts.run(name, lambda name=name: gpu.train_student(name), gpu.training_seconds(speed, name))  # type: ignore[misc]
    parts.run("compiled", gpu.compiled_speed, COMPILATION)
    return not parts.failed and (agreement is None or agreement["agree"])


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--write_data", type=Path, help="Write the data into this folder, and do nothing else.")
    parser.add_argument("--dataset", default="cifar100", help="write_data: name, file or folder of the images.")
    parser.add_argument("--data", type=Path, help="Folder of --write_data (default: random images).")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"), help="File of the results.")
    parser.add_argument("--minutes", type=float, default=6.0, within=Range(0, above=True), help="Time of all parts.")
    parser.add_argument("--teacher", default="resnet32x4", help="Architecture of the teacher.")
    parser.add_argument("--student", default="resnet8x4", help="Architecture of the students.")
    parser.add_argument("--teacher_epochs", type=int, default=36, within=Range(1), help="Epochs of the teacher.")
    parser.add_argument("--epochs", type=int, default=30, within=Range(1), help="Epochs of each student.")
    parser.add_argument("--batch_size", type=int, default=512, within=Range(2), help="Images per training step.")
    parser.add_argument(
        "--learning_rate", type=float, default=0.2, within=Range(0, above=True),
        help="Highest learning rate of the one-cycle schedule.",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=60, within=Range(2), help="Steps per measurement of speed.")
    parser.add_argument("--seed", type=int, default=0, within=Range(0), help="Random seed.")
    parser.add_argument(
        "--precision", choices=["auto", "fp32", "bf16"], default="auto", help="Precision of this project's steps."
    )
    parser.add_argument("--torch_compile", action="store_true", help="Compile the networks that are trained.")
    parser.add_argument("--skip", nargs="*", default=[], choices=PARTS, help="Parts to leave out.")
    parser.add_argument("--dry_run", action="store_true", help="Two steps of everything, also on a CPU.")
    args = parser.parse_args()
    if args.write_data:
        write_data(args.write_data, args.dataset)
        return
    if args.data:
        missing = [name for name in (*FILES, EINOPS) if not (args.data / name).exists()]
        if missing:
            raise UserError(f"{args.data} lacks {', '.join(missing)}: write it with --write_data {args.data}")
        sys.path.append(str(args.data / EINOPS))  # last, so that an installed einops is used
    if not run_parts(args):
        sys.exit(1)


if __name__ == "__main__":
    run(main)
