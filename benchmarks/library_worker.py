"""Measures training steps of one distillation library for libraries.py, which runs this script in two environments.

    python library_worker.py --library torchdistill --case images_kd

It prints a line of JSON: CPU-seconds per step without the first, and the peak memory of the process in MiB, before and
in training. All libraries train the same networks with the same random data, batch size, losses, precision (fp32) and
optimizer. The networks of images are this project's, which needs its `typings` folder on PYTHONPATH.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import kd.common  # noqa: F401  before torchvision

CLASSES, SIZE, PADDING = 100, 32, 4
TEACHER, STUDENT = "resnet56", "resnet20"
MEAN, STD = [0.5] * 3, [0.25] * 3
ALPHA, TEMPERATURE, SIMILARITIES = 0.1, 4.0, 3000.0
TEXT_CLASSES, TOKENS, VOCABULARY, LAYERS, STUDENT_LAYERS = 151, 16, 30522, 6, 3
LANGUAGE_TOKENS, LANGUAGE_VOCABULARY, BETA = 128, 32_000, 0.5
TEXT = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536, "vocab_size": VOCABULARY}


class Clock:
    """Records the CPU time of the ends of steps."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.before = peak_mib()

    def tick(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.process_time())

    def figures(self) -> dict[str, float]:
        seconds = (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)
        return {"seconds": seconds, "before_mib": self.before, "peak_mib": peak_mib()}


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# ---- images: soft targets, or similarities ----


def image_networks() -> tuple[nn.Module, nn.Module]:
    from kd.image_classification.teacher_model.classifier import new_classifier

    config = {"image_size": SIZE, "id2label": {i: str(i) for i in range(CLASSES)}}
    return new_classifier(TEACHER, config), new_classifier(STUDENT, config)


def image_data(samples: int) -> tuple[Tensor, Tensor]:
    pixels = torch.randint(256, (samples, SIZE, SIZE, 3), dtype=torch.uint8)
    return pixels, torch.randint(CLASSES, (samples,))


def images_in_kd(case: str, samples: int, batch: int) -> Clock:
    from transformers import PrinterCallback, TrainerCallback

    from kd.common.methods import parse_method
    from kd.common.training.inference import identity_collate
    from kd.common.training.trainer import KDTrainer
    from kd.image_classification.data.image_data import Images, SmallImageData
    from kd.image_classification.student_model.arguments import ImageTrainingArguments
    from kd.image_classification.student_model.matching import task_spec
    from kd.image_classification.student_model.methods import METHODS
    from kd.image_classification.teacher_model.classifier import frozen

    teacher, student = image_networks()
    data = SmallImageData(
        name="random", splits={"train": Images(*image_data(samples))}, label_names=[str(i) for i in range(CLASSES)],
        size=SIZE, mean=MEAN, std=STD, flip=True, fingerprint="random",
    )  # fmt: skip
    words = {"images_kd": f"kd:alpha={ALPHA}:temperature={TEMPERATURE}", "images_sp": f"sp:weight={SIMILARITIES}"}
    method = parse_method(words[case], METHODS, batch=batch)(task_spec(student, teacher, data))  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        trainer = KDTrainer(
            model=student.to(memory_format=torch.channels_last),  # type: ignore[call-overload]
            args=ImageTrainingArguments(
                output_dir=folder, num_train_epochs=1, per_device_train_batch_size=batch, precision="fp32",
                learning_rate=1e-3, save_strategy="no", eval_strategy="no", logging_strategy="no", report_to="none",
                disable_tqdm=True,
            ),
            objective=method.objective, features=method.features, teacher=frozen(teacher, "fp32"),
            teacher_features=method.teacher_features, data_collator=identity_collate,
            train_dataset=data.views("train", torch.device("cpu"), augment=True),
        )  # fmt: skip
        return trained(trainer, PrinterCallback, TrainerCallback)


def trained(trainer: Any, printer: type, callback: type) -> Clock:
    """Trains with a Trainer whose steps a Clock records."""
    clock = Clock()
    trainer.pop_callback(printer)
    trainer.add_callback(type("Ticking", (callback,), {"on_step_end": clock.tick})())
    trainer.train()
    return clock


class Cifar(Dataset[tuple[Tensor, Tensor]]):
    """Images as torchvision's CIFAR100 has them, with the transforms of torchdistill's recipes for CIFAR."""

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        from torchvision import transforms

        self.pixels, self.labels = pixels.numpy(), labels
        self.transform = transforms.Compose([
            transforms.RandomCrop(SIZE, PADDING), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ])  # fmt: skip

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        from PIL import Image

        return self.transform(Image.fromarray(self.pixels[row])), self.labels[row]


class Logits(nn.Module):
    """A classifier whose output is its logits. torchdistill's hooks read `classifier.backbone`."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(images).logits


def images_in_torchdistill(case: str, samples: int, batch: int) -> Clock:
    from torchdistill.core.distillation import DistillationBox

    teacher, student = (Logits(network) for network in image_networks())
    labels = {"criterion": {"key": "CrossEntropyLoss", "kwargs": {}}, "weight": 1.0,
              "criterion_wrapper": {"key": "SimpleLossWrapper", "kwargs": {
                  "input": {"is_from_teacher": False, "module_path": ".", "io": "output"},
                  "target": {"uses_label": True}}}}  # fmt: skip
    places = {f"{role}_module_{part}": value for role in ("student", "teacher") for part, value in
              (("path", "."), ("io", "output"))}  # fmt: skip
    soft = {"key": "KDLoss", "kwargs": places | {"temperature": TEMPERATURE, "alpha": ALPHA}}
    outputs = {f"{role}_output_path": "classifier.backbone" for role in ("student", "teacher")}
    similar = {"key": "SPKDLoss", "kwargs": outputs | {"reduction": "batchmean"}}
    terms: dict[str, Any] = {"kd": {"criterion": soft, "weight": 1.0}}
    if case == "images_sp":
        terms = {"labels": labels, "sp": {"criterion": similar, "weight": SIMILARITIES}}
    hooks = {"forward_hook": {"output": ["classifier.backbone"]}} if case == "images_sp" else {}
    box = DistillationBox(
        teacher, student, {"train": Cifar(*image_data(samples))},
        {
            "num_epochs": 1,
            "train_data_loader": {
                "dataset_id": "train", "sampler": {"class_or_func": torch.utils.data.RandomSampler},
                "kwargs": {"batch_size": batch, "num_workers": 0, "drop_last": True},
            },
            "teacher": {"requires_grad": False, "forward_proc": "forward_batch_only"} | hooks,
            "student": {"forward_proc": "forward_batch_only"} | hooks,
            "optimizer": {"key": "SGD", "kwargs": {
                "lr": 1e-3, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}},
            "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}},
        },
        torch.device("cpu"), None, False, 1,
    )  # fmt: skip
    box.teacher_model.eval()
    clock = Clock()
    box.pre_epoch_process(epoch=0)
    for images, targets, more in box.train_data_loader:  # the loop of its examples
        box.post_forward_process(loss=box.forward_process(images, targets, more))
        clock.tick()
    return clock


# ---- texts: soft targets ----


def text_networks() -> tuple[nn.Module, nn.Module]:
    from transformers import BertConfig, BertForSequenceClassification

    def network(layers: int) -> nn.Module:
        return BertForSequenceClassification(BertConfig(num_hidden_layers=layers, num_labels=TEXT_CLASSES, **TEXT))

    return network(LAYERS).eval(), network(STUDENT_LAYERS)


def text_data(samples: int) -> list[dict[str, Tensor]]:
    ids, labels = torch.randint(VOCABULARY, (samples, TOKENS)), torch.randint(TEXT_CLASSES, (samples,))
    ones = torch.ones(TOKENS, dtype=torch.long)
    return [{"input_ids": i, "attention_mask": ones, "labels": label} for i, label in zip(ids, labels, strict=True)]


def trained_in_kd(networks: tuple[nn.Module, nn.Module], objective: nn.Module, rows: Any, batch: int) -> Clock:
    """Trains with KDTrainer. `networks`: teacher and student."""
    from transformers import PrinterCallback, TrainerCallback

    from kd.common.training.arguments import KDTrainingArguments
    from kd.common.training.trainer import KDTrainer

    teacher, student = networks
    with tempfile.TemporaryDirectory() as folder:
        args = KDTrainingArguments(
            output_dir=folder, num_train_epochs=1, per_device_train_batch_size=batch, precision="fp32",
            train_sampling_strategy="random", save_strategy="no", eval_strategy="no", logging_strategy="no",
            report_to="none", disable_tqdm=True,
        )  # fmt: skip
        trainer = KDTrainer(model=student, args=args, objective=objective, teacher=teacher, train_dataset=rows)
        return trained(trainer, PrinterCallback, TrainerCallback)


def texts_in_kd(case: str, samples: int, batch: int) -> Clock:
    from kd.common.methods import labels_and_soft_targets

    objective = labels_and_soft_targets(ALPHA, TEMPERATURE).objective
    return trained_in_kd(text_networks(), objective, text_data(samples), batch)


def texts_in_textbrewer(case: str, samples: int, batch: int) -> Clock:
    from textbrewer import DistillationConfig, GeneralDistiller, TrainingConfig

    teacher, student = text_networks()

    def adaptor(batch: Any, output: Any) -> dict[str, Any]:
        return {"logits": output.logits, "losses": output.loss}

    with tempfile.TemporaryDirectory() as folder:
        distiller = GeneralDistiller(
            TrainingConfig(device="cpu", output_dir=folder, log_dir=folder),
            DistillationConfig(temperature=TEMPERATURE, hard_label_weight=ALPHA, kd_loss_weight=1 - ALPHA),
            teacher, student, adaptor, adaptor,
        )  # fmt: skip
        optimizer = torch.optim.AdamW(student.parameters(), 5e-5, weight_decay=0.0)
        clock = Clock()
        optimizer.register_step_post_hook(clock.tick)
        loader = DataLoader(text_data(samples), batch, shuffle=True, drop_last=True)  # type: ignore[arg-type]
        with distiller:
            distiller.train(optimizer, loader, num_epochs=1, max_grad_norm=1.0)
        return clock


# ---- language models: the generalized Jensen-Shannon divergence (GKD, arXiv:2306.13649), on given texts ----


def language_models() -> tuple[nn.Module, nn.Module]:
    from transformers import GPT2Config, GPT2LMHeadModel

    def network(layers: int, width: int) -> nn.Module:
        shape = {"n_layer": layers, "n_embd": width, "n_head": width // 64, "n_positions": LANGUAGE_TOKENS + 1}
        ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2LMHeadModel(GPT2Config(vocab_size=LANGUAGE_VOCABULARY, **shape, **ends, **dropout))

    return network(4, 256).eval(), network(2, 128)


def language_data(samples: int) -> Tensor:
    """One token more than there are labels."""
    return torch.randint(1, LANGUAGE_VOCABULARY, (samples, LANGUAGE_TOKENS + 1))


def language_in_kd(case: str, samples: int, batch: int) -> Clock:
    from kd.nlp.student_model.token_objective import divergence_of, token_level

    objective = token_level(0.0, divergence_of(f"js:beta={BETA}", temperature=1.0)).objective
    rows = [{"input_ids": ids[:-1], "labels": ids[1:]} for ids in language_data(samples)]
    return trained_in_kd(language_models(), objective, rows, batch)


def language_in_trl(case: str, samples: int, batch: int) -> Clock:
    """GKDTrainer without samples of the student (lmbda=0). It shifts the labels itself."""
    from datasets import Dataset as Rows
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback, default_data_collator
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    teacher, student = language_models()
    ids = language_data(samples)
    tokenizer = Tokenizer(models.WordLevel({"<end>": 0}, unk_token="<end>"))
    with tempfile.TemporaryDirectory() as folder:
        trainer = GKDTrainer(
            model=student, teacher_model=teacher,
            args=GKDConfig(
                output_dir=folder, num_train_epochs=1, per_device_train_batch_size=batch, bf16=False, lmbda=0.0,
                beta=BETA, gradient_checkpointing=False, learning_rate=5e-5, save_strategy="no", eval_strategy="no",
                logging_strategy="no", report_to="none", disable_tqdm=True,
            ),
            train_dataset=Rows.from_dict({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}),
            data_collator=default_data_collator,
            processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>"),
        )  # fmt: skip
        return trained(trainer, PrinterCallback, TrainerCallback)


MEASUREMENTS: dict[tuple[str, str], Callable[[str, int, int], Clock]] = {
    ("kd", "images_kd"): images_in_kd,
    ("kd", "images_sp"): images_in_kd,
    ("kd", "texts_kd"): texts_in_kd,
    ("kd", "language_js"): language_in_kd,
    ("torchdistill", "images_kd"): images_in_torchdistill,
    ("torchdistill", "images_sp"): images_in_torchdistill,
    ("textbrewer", "texts_kd"): texts_in_textbrewer,
    ("trl", "language_js"): language_in_trl,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", required=True, choices=sorted({library for library, _ in MEASUREMENTS}))
    parser.add_argument("--case", required=True, choices=sorted({case for _, case in MEASUREMENTS}))
    parser.add_argument("--steps", type=int, default=8, help="Steps of training.")
    parser.add_argument("--batch_size", type=int, default=64, help="Samples per step.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)
    clock = MEASUREMENTS[args.library, args.case](args.case, args.steps * args.batch_size, args.batch_size)
    packages = ("torch", "transformers", *([args.library] if args.library != "kd" else []))
    print(json.dumps(clock.figures() | {"versions": {name: version(name) for name in packages}}))


if __name__ == "__main__":
    main()
