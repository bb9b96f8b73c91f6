"""Distilling a text classifier by soft targets: this project's training against the KD Trainer that everyone writes.

    python benchmarks/kd_training.py
    python benchmarks/kd_training.py --dataset clinc_oos --teacher FOLDER_OR_NAME --student_layers 3

Textbook: a subclass of transformers' Trainer that runs the teacher in every step, in fp32, on random batches padded to
their longest text. Every further line adds one thing to the line above, and the last takes the cached logits away
again, so that the cache can be judged by what it saves. All train the same student on the same texts with the same
loss, batch size and optimizer, in short segments that take turns; the one pass that fills the cache is counted apart.
Rates are per second and per second of processor time (all threads together). Where other programs share the machine
read the latter, with OMP_NUM_THREADS=1, because threads wait busily for each other.
"""

import kd.common  # noqa: F401, I001 - before transformers' models, for its shim

import argparse
import copy
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from kd.common.training.arguments import KDTrainingArguments
from kd.common.cli import run
from kd.common.training.inference import run_inference
from kd.common.methods import labels_and_soft_targets
from kd.common.training.teacher_outputs import TeacherOutputs
from kd.common.training.trainer import KDTrainer
from kd.common.utils.errors import UserError
from kd.common.utils.devices import resolve_precision
from kd.nlp.data.loading import TextData, load_text_data
from kd.nlp.student_model.layers import cut_layers, switch_off_dropout
from kd.nlp.data.loading import Texts
from kd.nlp.teacher_model.teacher import Pretrained, label_config, load_classifier, tiny_bert

ALPHA, TEMPERATURE = 0.5, 2.0
MINILM = {"vocab_size": 30522, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
          "intermediate_size": 1536}  # fmt: skip
TEXTBOOK, LIVE = "textbook", "all of this, teacher in every step"


class TextbookTrainer(Trainer):
    """Soft targets (arXiv:1503.02531) as tutorials have them."""

    teacher: nn.Module

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        with torch.no_grad():
            teacher_logits = self.teacher(**inputs).logits
        soft = F.kl_div(
            F.log_softmax(outputs.logits / TEMPERATURE, dim=-1),
            F.softmax(teacher_logits / TEMPERATURE, dim=-1),
            reduction="batchmean",
        )
        loss = ALPHA * outputs.loss + (1 - ALPHA) * TEMPERATURE**2 * soft
        return (loss, outputs) if return_outputs else loss


class Clock(TrainerCallback):
    """Notes when steps end, in seconds of the clock and of the processor."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append((time.perf_counter(), time.process_time()))

    def seconds_per_step(self) -> tuple[float, float]:
        """Without the first step, which sets up the optimizer's state."""
        (wall, processor), (last_wall, last_processor) = self.ends[0], self.ends[-1]
        return (last_wall - wall) / (len(self.ends) - 1), (last_processor - processor) / (len(self.ends) - 1)


@dataclass(frozen=True)
class Way:
    """How KDTrainer trains."""

    cached: bool = False
    grouped: bool = False
    precision: str = "fp32"
    frozen_embeddings: bool = False
    dropout: bool = True
    attention: str = "sdpa"


def ladder(precision: str) -> dict[str, Way | None]:
    """Each way adds to the one before; None is the textbook."""
    way = Way()
    ways: dict[str, Way | None] = {TEXTBOOK: None, "KDTrainer, teacher in every step": way}
    additions: dict[str, dict[str, Any]] = {
        "+ cached teacher logits": {"cached": True},
        "+ batches of similar length": {"grouped": True},
        f"+ {precision}": {"precision": precision},
        "+ frozen embedding table": {"frozen_embeddings": True},
        "+ no dropout": {"dropout": False},
        "+ plain attention instead of torch's fused": {"attention": "eager"},
    }
    for name, addition in additions.items():
        ways[name] = way = replace(way, **addition)
    return ways | {LIVE: replace(way, cached=False)}


@dataclass
class Case:
    """What all ways share."""

    teacher: PreTrainedModel
    student: PreTrainedModel
    texts: Texts
    batch_size: int
    teacher_outputs: TeacherOutputs | None = None

    def fill_cache(self, precision: str) -> tuple[float, float]:
        """Seconds that it takes to ask the teacher once about every text, of the clock and of the processor."""

        def logits(**batch: Any) -> dict[str, torch.Tensor]:
            return {"logits": self.teacher(**batch).logits.float()}

        wall, processor = time.perf_counter(), time.process_time()
        outputs = run_inference(self.teacher, logits, self.texts.train, self.texts.collate, precision)
        ids = torch.tensor(self.texts.train["sample_id"])
        self.teacher_outputs = TeacherOutputs(ids, torch.stack(outputs["logits"]))
        return time.perf_counter() - wall, time.process_time() - processor

    def samples_per_second(self, way: Way | None, seed: int) -> tuple[float, float]:
        """Of the clock and of the processor, over one epoch of training."""
        clock, student = Clock(), copy.deepcopy(self.student)
        with tempfile.TemporaryDirectory() as folder:
            settings: dict[str, Any] = {
                "output_dir": folder, "num_train_epochs": 1, "per_device_train_batch_size": self.batch_size,
                "learning_rate": 1e-4, "dataloader_drop_last": True, "seed": seed, "disable_tqdm": True,
                "eval_strategy": "no", "save_strategy": "no", "logging_strategy": "no", "report_to": "none",
            }  # fmt: skip
            trainer = self._ours(way, student, settings) if way else self._textbook(student, settings)
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(clock)
            trainer.train()
        wall, processor = clock.seconds_per_step()
        return self.batch_size / wall, self.batch_size / processor

    def _textbook(self, student: PreTrainedModel, settings: dict[str, Any]) -> Trainer:
        trainer = TextbookTrainer(
            model=student, args=TrainingArguments(**settings), train_dataset=self.texts.train,
            data_collator=DataCollatorWithPadding(self.texts.collate.tokenizer),
        )  # fmt: skip
        trainer.teacher = self.teacher.to(trainer.args.device).eval()  # type: ignore[arg-type]
        return trainer

    def _ours(self, way: Way, student: PreTrainedModel, settings: dict[str, Any]) -> Trainer:
        student.get_input_embeddings().requires_grad_(not way.frozen_embeddings)
        student.set_attn_implementation(way.attention)
        if not way.dropout:
            switch_off_dropout(student)
        settings |= {
            "precision": way.precision,
            "train_sampling_strategy": "group_by_length" if way.grouped else "random",
        }
        return KDTrainer(
            model=student, args=KDTrainingArguments(**settings), train_dataset=self.texts.train,
            data_collator=self.texts.collate, objective=labels_and_soft_targets(ALPHA, TEMPERATURE).objective,
            teacher=None if way.cached else copy.deepcopy(self.teacher),
            teacher_outputs=self.teacher_outputs if way.cached else None,
        )  # fmt: skip


def case_of(data: TextData, teacher: str | None, student_layers: int, batch_size: int, steps: int) -> Case:
    """As many texts as `steps` batches hold, drawn at random."""
    start = load_classifier(teacher, data) if teacher else random_minilm(data)
    start.tokenizer.model_max_length = 128
    texts = Texts.of(data, start.tokenizer)
    number = min(len(texts.train), steps * batch_size)
    if number < 2 * batch_size:
        raise UserError(f"two batches are needed to time one: {number} texts make no two of {batch_size}")
    texts.splits["train"] = texts.train.shuffle(seed=0).select(range(number)).flatten_indices()
    return Case(start.model, cut_layers(start.model, student_layers), texts, batch_size)


def random_minilm(data: TextData) -> Pretrained:
    """A BERT of the size of MiniLM with random weights, which take as long as trained ones."""
    model = BertForSequenceClassification(BertConfig(**MINILM, **label_config(data)))  # type: ignore[arg-type]
    return Pretrained(model, tiny_bert(data).tokenizer)


def report(rates: dict[str, list[tuple[float, float]]], cache_seconds: tuple[float, float], texts: int) -> None:
    """`rates`: of each way, per round, samples per second of the clock and of the processor."""
    print("| training | samples/s, median (best) | ratio | per CPU-second, median (best) | ratio |")
    print("|---|---|---|---|---|")
    for name, measured in rates.items():
        cells = [name]
        for rate, base in zip(zip(*measured, strict=True), zip(*rates[TEXTBOOK], strict=True), strict=True):
            ratio = statistics.median(r / b for r, b in zip(rate, base, strict=True))
            cells += [f"{statistics.median(rate):,.0f} ({max(rate):,.0f})", f"{ratio:.2f}"]
        print("| " + " | ".join(cells) + " |")
    names = list(rates)
    live, cached = (statistics.median(processor for _, processor in rates[name]) for name in (LIVE, names[-2]))
    epochs = cache_seconds[1] / (texts / live - texts / cached)
    print(
        f"the cache of {texts} texts took {cache_seconds[0]:.1f} s ({cache_seconds[1]:.1f} CPU-seconds) and has paid "
        f"for itself after {epochs:.1f} epochs"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="intents")
    parser.add_argument("--teacher", help="Hub name or folder (default: random weights of the size of MiniLM)")
    parser.add_argument("--student_layers", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=48)
    parser.add_argument("--steps", type=int, default=50, help="of each way in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    args = parser.parse_args()

    torch.manual_seed(0)
    precision = resolve_precision(args.precision)
    data = load_text_data(args.dataset)
    case = case_of(data, args.teacher, args.student_layers, args.batch_size, args.steps)
    cache_seconds = case.fill_cache(precision)
    ways = ladder(precision)
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for seed in range(args.rounds):
        for name, way in ways.items():
            rates[name].append(case.samples_per_second(way, seed))
    print(f"{data.name}, batch {args.batch_size}, {args.student_layers} layers, {torch.get_num_threads()} threads")
    report(rates, cache_seconds, len(case.texts.train))


if __name__ == "__main__":
    run(main)
