"""Memory and time of caching teacher outputs for a million short texts: read, tokenize, cache, iterate over batches.

    python benchmarks/teacher_outputs.py
    python benchmarks/teacher_outputs.py --texts 20000 --features

The teacher is a small BERT with random weights, so most of the time is spent on the texts. Peak memory is the
anonymous memory of this process (RssAnon of /proc/self/status), without memory-mapped files.
"""

import kd.common  # noqa: F401, I001 - must be imported before transformers' models

import random
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import torch
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from kd.common.reporting.tables import markdown
from kd.common.cli import Parser, run
from kd.common.training.inference import LengthGroupedSampler, column_array
from kd.common.training.teacher_outputs import TeacherOutputs, cache_teacher_outputs
from kd.nlp.data.loading import load_text_data
from kd.nlp.data.loading import Texts

WORDS = [first + second + third for first in "bdfgklmnprst" for second in "aeiou" for third in "bdfgklmnprst"]
CLASSES = 100
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


class Stages:
    """Records seconds, rows per second and peak memory of each stage as rows of a table."""

    def __init__(self) -> None:
        self.lines, self.peak = list[list[str]](), 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, anonymous_megabytes())
            time.sleep(0.05)

    @contextmanager
    def stage(self, name: str, rows: int) -> Iterator[None]:
        self.peak, started = 0.0, time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        peak = max(self.peak, anonymous_megabytes())
        self.lines.append([name, f"{seconds:,.1f}", f"{rows / seconds:,.0f}", f"{peak:,.0f}"])


def anonymous_megabytes() -> float:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) / 1024


def write_texts(path: Path, number: int) -> None:
    """Writes a CSV file of labelled texts of 3 to 15 words."""
    generator = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        file.write("text,label\n")
        for row in range(number):
            words = generator.choices(WORDS, k=generator.randint(3, 15))
            file.write(f"{' '.join(words)},class {row % CLASSES}\n")


def iterate(texts: Texts, outputs: TeacherOutputs, batch_size: int) -> None:
    """One epoch of batches of token ids and teacher outputs, as in training."""
    sampler = LengthGroupedSampler(column_array(texts.train, "length"), batch_size, seed=0)
    loader = DataLoader(texts.train, batch_size, sampler=sampler, collate_fn=texts.collate)  # type: ignore[arg-type]
    for batch in loader:
        batch_outputs = outputs.batch(batch["sample_id"], batch["input_ids"].shape[1])
        assert batch_outputs.logits is not None and len(batch_outputs.logits) == len(batch["labels"])


def measure(folder: Path, number: int, features: dict[str, str], batch_size: int) -> str:
    """Measures all stages with files in `folder`, and returns the table."""
    write_texts(folder / "train.csv", number)
    stages = Stages()
    with stages.stage("read", number):
        data = load_text_data(str(folder))
    with stages.stage("tokenize", number):
        vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
        texts = Texts.of(data, BertTokenizer(vocab=vocabulary, model_max_length=64))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, num_labels=CLASSES,
    )  # fmt: skip
    teacher = BertForSequenceClassification(config)
    for name in ("cache", "read the cache"):
        with stages.stage(name, len(texts.train)):
            outputs = cache_teacher_outputs(
                teacher, texts.train, texts.collate, folder / "cache", features=features, batch_size=batch_size
            )
    with stages.stage("iterate", len(texts.train)):
        iterate(texts, outputs, batch_size)
    size = sum(path.stat().st_size for path in (folder / "cache").rglob("*") if path.is_file())
    headers = ["stage", "seconds", "texts per second", "peak anonymous memory, MiB"]
    table = markdown(headers, stages.lines)
    return f"{number:,} texts; {size / 2**20:,.0f} MiB of outputs on disk\n\n{table}"


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--texts", type=int, default=1_000_000, help="Number of texts.")
    parser.add_argument("--features", action="store_true", help="Also cache the hidden states of the layer.")
    parser.add_argument("--batch_size", type=int, default=256, help="Texts per batch.")
    args = parser.parse_args()
    features = {"layer_0": "bert.encoder.layer.0"} if args.features else {}
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        print(measure(Path(folder), args.texts, features, args.batch_size))


if __name__ == "__main__":
    run(main)
