"""Changes of saved students with a bottleneck, for the scripts forget.py and add.py: what changes, what remains."""

import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd.common.bottleneck.module import DiscreteKeyValueBottleneck
from kd.common.bottleneck.training import CodeDataset, add_samples
from kd.common.data.label_names import match_names
from kd.common.data.sources import shorten
from kd.common.reporting.origins import CARD
from kd.common.utils.errors import UserError
from kd.common.utils.files import write_text, writing_folder

REMAINS = (
    "Keys and encoder do not change. They still carry what was forgotten if they were trained on it, and so do the "
    "outputs of a teacher that they were matched with."
)
EXACT = "Exact: values and label counts are bit-equal to those of the same keys and encoder without these examples."
APPROXIMATE = (
    "Approximate, because the values were trained by gradients: the class is never predicted, but values and decoder "
    "keep its effect on the outputs of other classes. Counted values (--values counted --decoder mean) forget "
    "exactly."
)


@dataclass(frozen=True)
class SavedStudent:
    """A student with a bottleneck, its folder, and its tokenizer or image processor."""

    folder: str
    model: Any
    processor: Any

    def __post_init__(self) -> None:
        if not any(isinstance(part, DiscreteKeyValueBottleneck) for part in self.model.modules()):
            raise UserError(f"{shorten(self.folder)} has no bottleneck: pass a student of distill_bottleneck.py")

    @property
    def bottleneck(self) -> DiscreteKeyValueBottleneck:
        return self.model.bottleneck

    @property
    def label_names(self) -> list[str]:
        """Class names by class id."""
        return list(self.model.config.id2label.values())

    def save(self, output: str, description: str) -> None:
        """Writes the changed student, with its card from before the change, and prints the description."""
        card = Path(self.folder, CARD)
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
        with writing_folder(output) as folder:
            self.model.save_pretrained(folder)
            self.processor.save_pretrained(folder)
            write_text(folder / CARD, f"{text}\n## Changed\n\n{description} The figures above are from before.\n")
        print(f"{description}\nstudent: {output}")


def check_arguments(args: Namespace) -> None:
    """Raises UserError unless there are either classes or examples, and a new --output_dir: no student is replaced."""
    classes = getattr(args, "classes", None)
    if bool(classes) == bool(args.dataset):
        choices = "--classes NAME ... or --examples FILE" if hasattr(args, "classes") else "--examples FILE"
        raise UserError(f"nothing to change, or two things: pass {choices}")
    folder = Path(args.output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output_dir {shorten(args.output_dir)} is not empty: pass a new folder")


def forget_classes(student: SavedStudent, names: Sequence[str]) -> str:
    """Forgets the classes of these names. Returns a description of what was removed.

    Raises UserError for an unknown name.
    """
    bottleneck, labels = student.bottleneck, student.label_names
    for name in names:
        if name not in labels:
            near = get_close_matches(name, labels, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; some classes are {', '.join(labels[:5])}"
            raise UserError(f"the student has no class {shorten(name)}{hint}")
    counts, started = bottleneck.label_counts, time.perf_counter()
    before = None if counts is None else counts.sum()
    for name in names:
        bottleneck.forget_class(labels.index(name))
    seconds = time.perf_counter() - started
    removed = f"Forgot {len(names)} of {len(labels)} classes ({', '.join(names)}) in {1000 * seconds:.0f} ms."
    if counts is None or before is None:
        return f"{removed} {APPROXIMATE} {REMAINS}"
    examples = int(before - counts.sum()) // bottleneck.codebooks
    return f"{removed} {examples:,} counted examples or positions were subtracted. {_exact(counts)} {REMAINS}"


def forget_examples(student: SavedStudent, samples: CodeDataset) -> str:
    """Forgets samples with labels, as `bottleneck.forget`. Returns a description of what was removed.

    Raises UserError for trained values, and for examples that the values were never given.
    """
    bottleneck = student.bottleneck
    if bottleneck.label_counts is None:
        raise UserError(
            "--examples needs counted values, because gradients spread an example over all values: pass --classes, or "
            "a student trained with --values counted --decoder mean"
        )
    batch = {name: part.to(bottleneck.keys.device) for name, part in samples.__getitems__(range(len(samples))).items()}
    started = time.perf_counter()
    try:
        bottleneck.forget(batch["codes"], batch["labels"], batch.get("attention_mask"))
    except ValueError as error:
        raise UserError(f"{error}: pass texts or images of the training data, with their labels, each once") from None
    seconds = time.perf_counter() - started
    removed = f"Forgot {len(samples):,} examples in {1000 * seconds:.0f} ms, without the time of encoding them."
    return f"{removed} {_exact(bottleneck.label_counts)} {REMAINS}"


def add_examples(student: SavedStudent, samples: CodeDataset, labels: Sequence[str]) -> str:
    """Adds samples to counted values; `labels` are their classes by id, matched with those of the student by
    `match_names`. Those that the student lacks become new classes. Returns a description.

    Raises UserError for trained values.
    """
    bottleneck, names, config = student.bottleneck, student.label_names, student.model.config
    if bottleneck.label_counts is None:
        raise UserError("trained values cannot add examples: pass a student with --values counted --decoder mean")
    ids, started = torch.tensor(match_names(list(labels), names)), time.perf_counter()
    new = [label for label in samples.labels.unique().tolist() if ids[label] < 0]
    if new:
        ids[new] = torch.arange(len(names), len(names) + len(new))
        names += [labels[label] for label in new]
        bottleneck.add_classes(len(new))
        config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    add_samples(bottleneck, samples.with_labels(ids[samples.labels]))
    seconds = time.perf_counter() - started
    classes = f" and {len(new)} classes ({', '.join(names[-len(new) :])})" if new else ""
    return f"Added {len(samples):,} examples{classes} in {1000 * seconds:.0f} ms. Keys and encoder do not change."


def _exact(counts: Tensor) -> str:
    return f"{EXACT} The counts take {counts.numel() * counts.element_size():,} bytes of the student."
