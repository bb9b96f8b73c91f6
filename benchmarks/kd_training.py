"""Speed of distilling a text classifier by soft targets, compared with a textbook KD Trainer.

    python benchmarks/kd_training.py
    python benchmarks/kd_training.py --dataset clinc_oos --teacher FOLDER_OR_NAME --student_layers 3

Textbook: a subclass of transformers' Trainer that runs the teacher in every step, in fp32, on random batches padded to
their longest text. Each further line adds one change to the line above. The last line removes the cached logits again,
which shows what the cache saves. All lines train the same student on the same texts with the same loss, batch size and
optimizer, in short alternating segments. The pass that fills the cache is timed separately. Rates are per second and
per CPU-second (all threads). On a shared machine use the latter, with OMP_NUM_THREADS=1, because threads that wait for
each other use CPU time.
"""

import kd.common  # noqa: F401, I001 - must be imported before transformers' models

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
from kd.common.cli import Parser, run
from kd.common.training.inference import run_inference
from kd.common.methods import labels_and_soft_targets
from kd.common.training.teacher_outputs import TeacherOutputs
from kd.common.training.trainer import KDTrainer
from kd.common.utils.errors import UserError
from kd.common.utils.devices import resolve_precision
from kd.nlp.data.loading import TextData, load_text_data
from kd.nlp.student_model.layers import cut_layers, disable_dropout
from kd.nlp.data.loading import Texts
from kd.nlp.teacher_model.teacher import Pretrained, label_config, load_classifier, tiny_bert

ALPHA, TEMPERATURE = 0.5, 2.0
MINILM = {"vocab_size": 30522, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
          "intermediate_size": 1536}  # fmt: skip
TEXTBOOK, LIVE = "textbook", "all of this, teacher in every step"


class TextbookTrainer(Trainer):
    """Soft targets (arXiv:1503.02531) as in tutorials."""

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
    """Records the end of each step, in wall-clock and CPU seconds."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append((time.perf_counter(), time.process_time()))

    def seconds_per_step(self) -> tuple[float, float]:
        """Mean seconds per step, without the first step, which creates the optimizer's state."""
        (wall, cpu), (last_wall, last_cpu) = self.ends[0], self.ends[-1]
        return (last_wall - wall) / (len(self.ends) - 1), (last_cpu - cpu) / (len(self.ends) - 1)


@dataclass(frozen=True)
class Variant:
    """Options of a KDTrainer run."""

    cached: bool = False
    grouped: bool = False
    precision: str = "fp32"
    frozen_embeddings: bool = False
    dropout: bool = True
    attention: str = "sdpa"


def variants(precision: str) -> dict[str, Variant | None]:
    """Each variant adds one option to the previous one. None is the textbook Trainer."""
    variant = Variant()
    found: dict[str, Variant | None] = {TEXTBOOK: None, "KDTrainer, teacher in every step": variant}
    additions: dict[str, dict[str, Any]] = {
        "+ cached teacher logits": {"cached": True},
        "+ batches of similar length": {"grouped": True},
        f"+ {precision}": {"precision": precision},
        "+ frozen embedding table": {"frozen_embeddings": True},
        "+ no dropout": {"dropout": False},
        "+ plain attention instead of torch's fused": {"attention": "eager"},
    }
    for name, addition in additions.items():
        found[name] = variant = replace(variant, **addition)
    return found | {LIVE: replace(variant, cached=False)}


@dataclass
class Case:
    """The models, texts and cached logits that all variants share."""

    teacher: PreTrainedModel
    student: PreTrainedModel
    texts: Texts
    batch_size: int
    teacher_outputs: TeacherOutputs | None = None

    def fill_cache(self, precision: str) -> tuple[float, float]:
        """Runs the teacher once on every text. Returns wall-clock and CPU seconds."""

        def logits(**batch: Any) -> dict[str, torch.Tensor]:
            return {"logits": self.teacher(**batch).logits.float()}

        wall, cpu = time.perf_counter(), time.process_time()
        outputs = run_inference(self.teacher, logits, self.texts.train, self.texts.collate, precision)
        ids = torch.tensor(self.texts.train["sample_id"])
        self.teacher_outputs = TeacherOutputs(ids, torch.stack(outputs["logits"]))
        return time.perf_counter() - wall, time.process_time() - cpu

    def samples_per_second(self, variant: Variant | None, seed: int) -> tuple[float, float]:
        """Samples per wall-clock and per CPU second, over one epoch of training."""
        clock, student = Clock(), copy.deepcopy(self.student)
        with tempfile.TemporaryDirectory() as folder:
            kwargs: dict[str, Any] = {
                "output_dir": folder, "num_train_epochs": 1, "per_device_train_batch_size": self.batch_size,
                "learning_rate": 1e-4, "dataloader_drop_last": True, "seed": seed, "disable_tqdm": True,
                "eval_strategy": "no", "save_strategy": "no", "logging_strategy": "no", "report_to": "none",
            }  # fmt: skip
            trainer = self._kd_trainer(variant, student, kwargs) if variant else self._textbook(student, kwargs)
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(clock)
            trainer.train()
        wall, cpu = clock.seconds_per_step()
        return self.batch_size / wall, self.batch_size / cpu

    def _textbook(self, student: PreTrainedModel, kwargs: dict[str, Any]) -> Trainer:
        trainer = TextbookTrainer(
            model=student, args=TrainingArguments(**kwargs), train_dataset=self.texts.train,
            data_collator=DataCollatorWithPadding(self.texts.collate.tokenizer),
        )  # fmt: skip
        trainer.teacher = self.teacher.to(trainer.args.device).eval()  # type: ignore[arg-type]
        return trainer

    def _kd_trainer(self, variant: Variant, student: PreTrainedModel, kwargs: dict[str, Any]) -> Trainer:
        student.get_input_embeddings().requires_grad_(not variant.frozen_embeddings)
        student.set_attn_implementation(variant.attention)
        if not variant.dropout:
            disable_dropout(student)
        kwargs |= {
            "precision": variant.precision,
            "train_sampling_strategy": "group_by_length" if variant.grouped else "random",
        }
        return KDTrainer(
            model=student, args=KDTrainingArguments(**kwargs), train_dataset=self.texts.train,
            data_collator=self.texts.collate, objective=labels_and_soft_targets(ALPHA, TEMPERATURE).objective,
            teacher=None if variant.cached else copy.deepcopy(self.teacher),
            teacher_outputs=self.teacher_outputs if variant.cached else None,
        )  # fmt: skip


def make_case(data: TextData, teacher: str | None, student_layers: int, batch_size: int, steps: int) -> Case:
    """Draws the texts of `steps` batches at random, and cuts the student from the teacher."""
    pretrained = load_classifier(teacher, data) if teacher else random_minilm(data)
    pretrained.tokenizer.model_max_length = 128
    texts = Texts.of(data, pretrained.tokenizer)
    number = min(len(texts.train), steps * batch_size)
    if number < 2 * batch_size:
        raise UserError(
            f"{number} texts are fewer than two batches of {batch_size}: pass a smaller --batch_size or more --steps"
        )
    texts.splits["train"] = texts.train.shuffle(seed=0).select(range(number)).flatten_indices()
    return Case(pretrained.model, cut_layers(pretrained.model, student_layers), texts, batch_size)


def random_minilm(data: TextData) -> Pretrained:
    """A BERT of the size of MiniLM with random weights, which are as fast as trained ones."""
    model = BertForSequenceClassification(BertConfig(**MINILM, **label_config(data)))  # type: ignore[arg-type]
    return Pretrained(model, tiny_bert(data).tokenizer)


def report(rates: dict[str, list[tuple[float, float]]], cache_seconds: tuple[float, float], texts: int) -> None:
    """Prints the table. `rates`: samples per wall-clock and per CPU second, per variant and round."""
    print("| training | samples/s, median (best) | ratio | per CPU-second, median (best) | ratio |")
    print("|---|---|---|---|---|")
    for name, measured in rates.items():
        cells = [name]
        for rate, base in zip(zip(*measured, strict=True), zip(*rates[TEXTBOOK], strict=True), strict=True):
            ratio = statistics.median(r / b for r, b in zip(rate, base, strict=True))
            cells += [f"{statistics.median(rate):,.0f} ({max(rate):,.0f})", f"{ratio:.2f}"]
        print("| " + " | ".join(cells) + " |")
    names = list(rates)
    live, cached = (statistics.median(cpu for _, cpu in rates[name]) for name in (LIVE, names[-2]))
    epochs = cache_seconds[1] / (texts / live - texts / cached)
    print(
        f"the cache of {texts} texts took {cache_seconds[0]:.1f} s ({cache_seconds[1]:.1f} CPU-seconds) and pays off "
        f"after {epochs:.1f} epochs"
    )


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--dataset", default="intents", help="Embedded dataset, Hub name, folder or file.")
    parser.add_argument("--teacher", help="Hub name or folder (default: a BERT like MiniLM with random weights).")
    parser.add_argument("--student_layers", type=int, default=3, help="Layers of the teacher to keep.")
    parser.add_argument("--batch_size", type=int, default=48, help="Texts per step.")
    parser.add_argument("--steps", type=int, default=50, help="Steps per variant and round.")
    parser.add_argument("--rounds", type=int, default=5, help="Number of rounds, each with all variants.")
    parser.add_argument(
        "--precision", choices=["auto", "fp32", "bf16"], default="auto", help="Precision of the last variants."
    )
    args = parser.parse_args()

    torch.manual_seed(0)
    precision = resolve_precision(args.precision)
    data = load_text_data(args.dataset)
    case = make_case(data, args.teacher, args.student_layers, args.batch_size, args.steps)
    cache_seconds = case.fill_cache(precision)
    options = variants(precision)
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in options}
    for seed in range(args.rounds):
        for name, variant in options.items():
            rates[name].append(case.samples_per_second(variant, seed))
    print(f"{data.name}, batch {args.batch_size}, {args.student_layers} layers, {torch.get_num_threads()} threads")
    report(rates, cache_seconds, len(case.texts.train))


if __name__ == "__main__":
    run(main)
