"""Changes of saved students with a bottleneck, for the scripts forget.py and add.py: what changes, what remains."""

import time
from argparse import Namespace
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd.common.bottleneck.module import DiscreteKeyValueBottleneck
from kd.common.bottleneck.training import CodeDataset, add_samples
from kd.common.data.sources import shorten
from kd.common.reporting.model_card import Savable
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


def bottleneck_of(model: Any, name: str) -> DiscreteKeyValueBottleneck:
    """The bottleneck of a student. Raises UserError if it has none."""
    found = [part for part in model.modules() if isinstance(part, DiscreteKeyValueBottleneck)]
    if not found:
        raise UserError(f"{shorten(name)} has no bottleneck: pass a student of distill_bottleneck.py")
    return found[0]


def check_arguments(args: Namespace) -> None:
    """Raises UserError unless there are either classes or examples, and a new --output_dir: no student is replaced."""
    classes = getattr(args, "classes", None)
    if bool(classes) == bool(args.dataset):
        choices = "--classes NAME ... or --examples FILE" if hasattr(args, "classes") else "--examples FILE"
        raise UserError(f"nothing to change, or two things: pass {choices}")
    folder = Path(args.output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output_dir {shorten(args.output_dir)} is not empty: pass a new folder")


def forget_classes(bottleneck: DiscreteKeyValueBottleneck, names: Sequence[str], labels: Sequence[str]) -> str:
    """Forgets the classes of these names; `labels` are the classes by id. Returns a description of what was removed.

    Raises UserError for an unknown name.
    """
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


def forget_examples(bottleneck: DiscreteKeyValueBottleneck, samples: CodeDataset) -> str:
    """Forgets samples with labels, as `bottleneck.forget`. Returns a description of what was removed.

    Raises UserError for trained values, and for examples that the values were never given.
    """
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


def add_examples(
    model: Any, bottleneck: DiscreteKeyValueBottleneck, samples: CodeDataset, labels: Sequence[str]
) -> str:
    """Adds samples to counted values; `labels` are their classes by id. Those that the model lacks become new classes.
    Returns a description. Raises UserError for trained values.
    """
    if bottleneck.label_counts is None:
        raise UserError("trained values cannot add examples: pass a student with --values counted --decoder mean")
    names = list(model.config.id2label.values())
    used = [labels[label] for label in samples.labels.unique().tolist()]
    new = [name for name in used if name not in names]
    started = time.perf_counter()
    if new:
        bottleneck.add_classes(len(new))
        names += new
        model.config.id2label, model.config.label2id = dict(enumerate(names)), {n: i for i, n in enumerate(names)}
    ids = torch.tensor([names.index(name) if name in names else 0 for name in labels])
    add_samples(bottleneck, samples.with_labels(ids[samples.labels]))
    seconds = time.perf_counter() - started
    classes = f" and {len(new)} classes ({', '.join(new)})" if new else ""
    return f"Added {len(samples):,} examples{classes} in {1000 * seconds:.0f} ms. Keys and encoder do not change."


def _exact(counts: Tensor) -> str:
    return f"{EXACT} The counts take {counts.numel() * counts.element_size():,} bytes of the student."


def save_changed(model: Savable, processor: Savable, source: str, output: str, description: str) -> None:
    """Writes a changed student, with the card of its `source` folder, and prints the description."""
    card = Path(source, CARD)
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    with writing_folder(output) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        write_text(folder / CARD, f"{text}\n## Changed\n\n{description} The figures above are from before.\n")
    print(f"{description}\nstudent: {output}")
