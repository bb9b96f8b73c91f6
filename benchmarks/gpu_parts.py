"""The parts of gpu.py, which imports them once einops can be imported, if need be from the folder of the data."""

import json
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_steps import GraphStep, difference, step_in_fp32
from image_training import DEVICE, plain_seconds, random_data, seconds_per_step
from packed_images import unpack
from safetensors import safe_open
from transformers import set_seed
from transformers.utils import logging

from kd.common.methods import Method, labels, labels_and_soft_targets
from kd.common.utils.devices import autocast, environment, resolve_precision, synchronize
from kd.image_classification.data.image_data import Images, SmallImageData
from kd.image_classification.student_model.arguments import SimKDArguments
from kd.image_classification.student_model.simkd import simkd, simkd_student
from kd.image_classification.teacher_model.classifier import ImageClassifier, frozen, new_classifier

ALPHA, TEMPERATURE, FACTOR = 0.1, 4.0, 2
PAPER_BATCH = 64
COMPARED = 32  # images of the comparison of GPU and CPU
TOLERANCE = {"logits": 1e-4, "loss": 1e-4, "gradients": 1e-3, "weights": 1e-4}  # of `difference`
EVALUATED_AT_ONCE = 1000
WORKERS = 8  # of the DataLoader of plain PyTorch
ON_LABELS = ("teacher", "control")  # trained without a teacher, and without the shape of its map
Figures = dict[str, Any]


def about(args: Namespace) -> Figures:
    """The machine, the versions and the arguments."""
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    machine = environment(resolve_precision(args.precision, DEVICE), DEVICE)
    return machine | {"cuda": torch.version.cuda, "cudnn_benchmark": True, "arguments": settings}


class Gpu:
    """Data, networks and measurements."""

    data: SmallImageData
    trained_teacher: ImageClassifier

    def __init__(self, args: Namespace) -> None:
        self.args, self.precision = args, resolve_precision(args.precision, DEVICE)
        logging.disable_progress_bar()
        torch.backends.cudnn.benchmark = True  # all batches have one size

    def read_data(self) -> Figures:
        few = torch.arange(4 * self.args.batch_size)
        if self.args.data is None:
            self.data = random_data(len(few))
            self.data.splits["test"] = self.data.splits["validation"]
        else:
            self.data = read_packed(sorted(self.args.data.glob("images_*.safetensors")))
        if self.args.dry_run:
            self.data = replace(self.data, splits={name: self.data.splits[name][few] for name in ("train", "test")})
        return {"name": self.data.name} | {split: len(images) for split, images in self.data.splits.items()}

    def student(self, name: str, teacher: ImageClassifier | None) -> tuple[ImageClassifier, Method]:
        """The untrained network of teacher, control, kd, simkd_control or simkd, and its method."""
        set_seed(self.args.seed)
        if teacher is None or name == "kd":
            network = new_classifier(self.args.teacher if name == "teacher" else self.args.student, self.data.config)
            return network, labels_and_soft_targets(ALPHA, TEMPERATURE) if name == "kd" else labels()
        student = simkd_student(self.args.student, teacher, self.data, FACTOR, reuse_head=name == "simkd")
        return student, simkd(student, teacher, SimKDArguments(), TEMPERATURE) if name == "simkd" else labels()

    def untrained_teacher(self) -> ImageClassifier:
        return self.student("teacher", None)[0].eval()

    # ---- agreement ----

    def agreement(self) -> Figures:
        """The differences of GPU and CPU, for KD and SimKD."""
        images, teacher = self.data.views("train", torch.device("cpu")), self.untrained_teacher()
        batch, figures = images.__getitems__(list(range(min(COMPARED, len(images))))), dict[str, Any]()
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            for name in ("kd", "simkd"):
                student, method = self.student(name, teacher)
                devices = torch.device("cpu"), DEVICE
                expected, found = (step_in_fp32(student, method, teacher, batch, device) for device in devices)
                figures[name] = {key: difference(found[key], expected[key]) for key in TOLERANCE}
        agree = all(values[key] <= TOLERANCE[key] for values in figures.values() for key in TOLERANCE)
        return figures | {"tolerance": TOLERANCE, "agree": agree}

    # ---- speed ----

    def speed(self) -> Figures:
        """Images per second of SimKD's step in three loops, and of the trainer's other steps."""
        batch, figures = self.args.batch_size, {}
        for size in sorted({min(PAPER_BATCH, batch), batch}):
            for loop in (self.plain, self.trainer, self.graph):
                figures |= self.measured(loop, "simkd", size)
        for name in (*ON_LABELS, "kd", "simkd_control"):
            figures |= self.measured(self.trainer, name, batch)
        return figures

    def compiled_speed(self) -> Figures:
        batch = self.args.batch_size
        return self.measured(self.compiled, "simkd", batch) | self.measured(self.compiled, "teacher", batch)

    def measured(self, loop: Callable[[str, int], float], name: str, batch: int) -> Figures:
        """{loop, method, batch: {images per second, peak memory}}. `loop` returns seconds per step."""
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        rate = batch / loop(name, batch)
        return {_row(loop.__name__, name, batch): {"images_per_second": round(rate, 1), "peak_mib": peak_mib()}}

    def some_data(self, batch: int) -> SmallImageData:
        """The training images of --steps steps, repeated if there are too few."""
        steps, images = 2 if self.args.dry_run else self.args.steps, self.data.splits["train"]
        return replace(self.data, splits={"train": images[torch.arange(steps * batch) % len(images)]})

    def plain(self, name: str, batch: int) -> float:
        teacher, workers = self.untrained_teacher(), WORKERS if DEVICE.type == "cuda" else 0
        return plain_seconds(self.student(name, teacher)[0], teacher, self.some_data(batch), batch, workers)

    def trainer(self, name: str, batch: int, **options: Any) -> float:
        teacher = None if name in ON_LABELS else self.untrained_teacher()
        return self.fit(*self.student(name, teacher), teacher, self.some_data(batch), batch, **options)

    def compiled(self, name: str, batch: int) -> float:
        return self.trainer(name, batch, torch_compile=True)

    def graph(self, name: str, batch: int) -> float:
        teacher, data = self.untrained_teacher(), self.some_data(batch)
        student, method = self.student(name, teacher)
        views = data.views("train", DEVICE, augment=True)
        step = GraphStep(student, method, frozen(teacher, self.precision), views, batch, self.precision)
        batches = torch.randperm(len(views), device=DEVICE).split(batch)
        step(batches[0])
        synchronize(DEVICE)
        started = time.perf_counter()
        for rows in batches[1:]:
            step(rows)
        synchronize(DEVICE)
        return (time.perf_counter() - started) / (len(batches) - 1)

    # ---- training ----

    def fit(
        self, model: ImageClassifier, method: Method, teacher: ImageClassifier | None, data: SmallImageData,
        batch: int, epochs: int = 1, **options: Any,
    ) -> float:  # fmt: skip
        """Trains a model with KDTrainer. Returns the seconds per step."""
        options |= {"learning_rate": self.args.learning_rate, "seed": self.args.seed}
        if self.args.dry_run:
            options["max_steps"] = 2
        paths, args = (method.features, method.teacher_features), Namespace(batch_size=batch, precision=self.precision)
        return seconds_per_step(model, method.objective, paths, teacher, data, args, epochs, **options)

    def train(self, name: str, teacher: ImageClassifier | None, epochs: int) -> tuple[ImageClassifier, Figures]:
        (model, method), batch = self.student(name, teacher), self.args.batch_size
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        seconds = self.fit(model, method, teacher, self.data, batch, epochs, torch_compile=self.args.torch_compile)
        figures = {"images_per_second": round(batch / seconds, 1), "peak_mib": peak_mib()}
        return model, {"epochs": epochs, "test_accuracy": round(self.accuracy(model), 4)} | figures

    def train_teacher(self) -> Figures:
        self.trained_teacher, figures = self.train("teacher", None, self.args.teacher_epochs)
        return figures

    def train_student(self, name: str) -> Figures:
        return self.train(name, None if name in ON_LABELS else self.trained_teacher, self.args.epochs)[1]

    def training_seconds(self, speed: Figures | None, name: str) -> float:
        """The seconds that a training takes at the measured speed; 0 if it was not measured."""
        measured = (speed or {}).get(_row("trainer", name, self.args.batch_size))
        if measured is None or self.args.dry_run:
            return 0.0
        epochs = self.args.teacher_epochs if name == "teacher" else self.args.epochs
        return epochs * len(self.data.splits["train"]) / measured["images_per_second"]

    @torch.no_grad()
    def accuracy(self, model: ImageClassifier) -> float:
        """The share of test images that a model classifies correctly."""
        views, right = self.data.views("test", DEVICE), 0
        model.to(DEVICE).eval()
        for rows in torch.arange(len(views)).split(EVALUATED_AT_ONCE):
            batch = views.__getitems__(rows.tolist())
            with autocast(DEVICE, self.precision):
                right += int((model(batch["pixel_values"]).logits.argmax(1) == batch["labels"]).sum())
        return right / len(views)


def read_packed(files: list[Path]) -> SmallImageData:
    """The dataset in the files of gpu.py --write_data."""
    pixels, known, described = [], [], {}
    for file in files:
        with safe_open(file, "pt") as opened:
            described = json.loads(opened.metadata()["about"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  it is no dict
        pixels.append(unpack(tensors, DEVICE).cpu())
        known.append(tensors["labels"].long())
    sizes: dict[str, int] = described.pop("splits")
    parts = (torch.cat(tensors).split(list(sizes.values())) for tensors in (pixels, known))
    splits = {name: Images(*images) for name, *images in zip(sizes, *parts, strict=True)}
    return SmallImageData(splits=splits, **described)


def peak_mib() -> int | None:
    return round(torch.cuda.max_memory_allocated() / 2**20) if DEVICE.type == "cuda" else None


def _row(loop: str, name: str, batch: int) -> str:
    return f"{loop}, {name}, batch {batch}"
