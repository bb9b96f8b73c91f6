"""Distillation of an encoder-decoder translator: models, the teacher's translations, training, evaluation and report.

Word-level distillation learns the teacher's distribution over each next token; sequence-level distillation learns the
teacher's translations (Kim and Rush, "Sequence-Level Knowledge Distillation", arXiv:1606.07947).
"""

import copy
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel, PreTrainedTokenizerBase

from kd.common.data.fingerprints import dataset_hash, outputs_key
from kd.common.metrics.cost import cost
from kd.common.metrics.quality import token_counts, token_metrics, translation_metrics
from kd.common.metrics.verdict import Measurement, measure_bleu
from kd.common.reporting.plots import plot_curves
from kd.common.token_terms import TokenWeights, per_sequence, per_token
from kd.common.training.arguments import KDTrainingArguments
from kd.common.training.inference import NOT_INPUTS, run_inference
from kd.common.training.teacher_outputs import cache_outputs
from kd.common.training.trainer_run import TrainerRun
from kd.common.utils.errors import UserError
from kd.nlp.data.loading import Collator
from kd.nlp.data.translation import KNOWN, TranslationCollator, TranslationData, tokenize_translation
from kd.nlp.student_model.arguments import CUT
from kd.nlp.student_model.cards import card_of
from kd.nlp.student_model.generation import GenerationTask, Splits, check_same_vocabulary
from kd.nlp.student_model.layers import cut_translator, number_of_layers
from kd.nlp.student_model.token_objective import parts_of
from kd.nlp.teacher_model import SCRATCH
from kd.nlp.teacher_model.generative import (
    Generator,
    beam_search,
    joint_bpe,
    load_translator,
    random_marian,
    special_ids_of,
    translate,
)

TIMED = 20  # number of sentences for measuring the time of translation
USAGE = """from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

folder = "student"  # the path of this model, or its name on the Hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
ids = model.generate(**tokenizer({sentence}, return_tensors="pt"))  # greedy, unless num_beams is more than 1
print(tokenizer.decode(ids[0], skip_special_tokens=True))"""


def load_named_models(args: Any) -> tuple[Generator | None, Generator | None]:
    """The models of --teacher and --student; None for `scratch` and `cut`. `args` are those of distill_translation.py.

    Raises UserError if this student cannot be distilled from this teacher.
    """
    teacher = None if args.teacher == SCRATCH else load_translator(args.teacher, args.max_length)
    student = None if args.student in (SCRATCH, CUT) else load_translator(args.student, args.max_length)
    if args.student == CUT:
        layers = number_of_layers(teacher.model) if teacher else (args.teacher_layers, args.teacher_layers)
        kept = args.student_encoder_layers, args.student_decoder_layers
        for side, number, most in zip(("encoder", "decoder"), kept, layers, strict=True):
            if number > most:
                raise UserError(f"--student_{side}_layers {number} cannot be cut from the teacher's {most}")
    check_same_vocabulary(args, student, teacher)
    return teacher, student


class TranslationEvaluation(NamedTuple):
    """A model's entry in results.json, the seconds to translate 100 sentences, the signatures of sacreBLEU, and the
    measurement of its validation BLEU.
    """

    entry: dict[str, Any]
    seconds: dict[str, float]
    signatures: dict[str, str]
    measurement: Measurement


class TranslationTask(GenerationTask):
    """The distillation of a translator. `data` is TranslationData; `splits` contain its tokens."""

    auto_class = AutoModelForSeq2SeqLM

    @staticmethod
    def learn_tokenizer(args: Any, data: TranslationData) -> PreTrainedTokenizerBase:
        train = data.splits["train"]
        return joint_bpe([*train["source"], *train["target"]], args.vocabulary_size, args.max_length)

    @staticmethod
    def tokenize(args: Any, data: TranslationData, tokenizer: PreTrainedTokenizerBase) -> Splits:
        return tokenize_translation(data, tokenizer, args.source_prefix)

    # ---- models ----

    def initial_teacher(self) -> PreTrainedModel:
        args, tokenizer = self.args, self.tokenizer
        if self.pretrained_teacher is not None:
            return copy.deepcopy(self.pretrained_teacher)
        ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "eos_token_id")}
        ids["decoder_start_token_id"] = ids["pad_token_id"]
        layers = args.teacher_layers
        return random_marian(len(tokenizer), ids, args.teacher_width, layers, layers, args.dropout, args.max_length)

    def initial_control(self, teacher: PreTrainedModel) -> PreTrainedModel:
        return self.initial_student(self.initial_teacher() if self.args.student == CUT else teacher)

    def initial_student(self, teacher: PreTrainedModel) -> PreTrainedModel:
        args = self.args
        layers = args.student_encoder_layers, args.student_decoder_layers
        if self.pretrained_student is not None:
            return copy.deepcopy(self.pretrained_student)
        if args.student == CUT:
            return cut_translator(teacher, *layers)
        vocabulary, ids = teacher.config.vocab_size, special_ids_of(teacher)
        return random_marian(vocabulary, ids, args.student_width, *layers, args.dropout, args.max_length)

    # ---- training ----

    def learning_rate(self, training: KDTrainingArguments, role: str) -> float:
        rate = self.args.teacher_learning_rate if role == "teacher" else None
        return float(rate or training.learning_rate)

    def collator(self, model: PreTrainedModel) -> Callable[[Any], dict[str, Any]]:
        return TranslationCollator(self.tokenizer, model)

    def token_metrics(self, counts: np.ndarray) -> dict[str, float]:
        return token_metrics(counts)

    @property
    def divergence(self) -> str:
        return str(parts_of(self.args.method).divergence)

    @property
    def token_weights(self) -> TokenWeights:
        return per_sequence if self.args.average == "sequences" else per_token

    def train_student(
        self, run: TrainerRun, teacher: PreTrainedModel, translations: Dataset | None = None
    ) -> PreTrainedModel:
        """The stage `student`: trains on the teacher's distributions (--method kd or another divergence), on its
        `translations` (sequence_kd), or on both.
        """
        distributions_of = None if parts_of(self.args.method).divergence is None else teacher
        return self.stage(run, "student", partial(self.initial_student, teacher), distributions_of, translations)

    def translate_training_set(self, run: TrainerRun, teacher: PreTrainedModel) -> Dataset:
        """The train split with the teacher's translations as labels. They are computed once and cached."""
        rows, beams, precision = self.splits["train"], self.args.beams, run.args.precision
        sources = rows.select_columns(["sample_id", "input_ids", "attention_mask", "length"])
        key = outputs_key(teacher, dataset_hash(sources), beams, self.args.max_length, precision)
        call, collate, folder = beam_search(teacher, beams), Collator(self.tokenizer), run.folder / "teacher_outputs"
        with run.timed("teacher_outputs"):
            translations = cache_outputs(teacher, call, sources, collate, folder, key, precision)

        def relabel(batch: dict[str, list]) -> dict[str, list]:
            labels = translations.feature("tokens", torch.tensor(batch["sample_id"]))
            lengths = [len(source) + len(target) for source, target in zip(batch["input_ids"], labels, strict=True)]
            return {"labels": [tokens.tolist() for tokens in labels], "length": lengths}

        return rows.map(relabel, batched=True, load_from_cache_file=False, new_fingerprint=key)

    # ---- evaluation and report ----

    def evaluate(self, run: TrainerRun, role: str, model: PreTrainedModel) -> TranslationEvaluation:
        """Evaluates a model on every split but train. Warns if the teacher is no better than chance."""
        entry, greedy, signatures = self.measured(self._name(role, model), model)
        translator, validation = Generator(model, self.tokenizer), self.splits["validation"]
        seconds = {
            f"seconds_per_100_{decoding}": seconds_per_100(translator, validation, beams)
            for decoding, beams in (("greedy", 1), ("beam", self.args.beams))
        }
        if role == "teacher":
            self.warn_if_at_chance(run, entry, model.config.vocab_size)
        references = self.data.splits["validation"]["target"][:]
        return TranslationEvaluation(entry, seconds, signatures, measure_bleu(greedy["validation"], references))

    def measured(
        self, name: str, model: PreTrainedModel
    ) -> tuple[dict[str, Any], dict[str, list[str]], dict[str, str]]:
        """A model's entry in results.json with metrics of greedy and of beam search, its greedy translations of every
        split but train, and the signatures of sacreBLEU. Always in fp32, the precision of a model that a user loads.
        """
        translator = Generator(model, self.tokenizer)
        metrics: dict[str, dict[str, float]] = {}
        signatures: dict[str, str] = {}
        greedy: dict[str, list[str]] = {}  # by split
        for split in (split for split in self.splits if split != "train"):
            rows, references = self.splits[split], self.data.splits[split]["target"][:]
            metrics[split] = teacher_forced_metrics(translator, rows)
            for suffix, beams in (("", 1), ("_beam", self.args.beams)):
                ids = translate(translator, rows, beams, description="evaluating")
                texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
                scores, signatures = translation_metrics(texts, references)
                metrics[split] |= {metric + suffix: score for metric, score in scores.items()}
                greedy.setdefault(split, texts)
        typical = self.splits["validation" if "validation" in metrics else next(iter(metrics))]
        return {"name": name, **cost(model, median_pair(translator, typical)), "metrics": metrics}, greedy, signatures

    def _name(self, role: str, model: PreTrainedModel) -> str:
        if role == "teacher" and self.pretrained_teacher is not None:
            return str(self.args.teacher)
        layers = "+".join(map(str, number_of_layers(model)))
        return f"{model.config.model_type} of {layers} layers, width {model.config.hidden_size}"

    def report(self, run: TrainerRun, evaluations: dict[str, TranslationEvaluation], student: PreTrainedModel) -> None:
        """Writes the results and the student's folder. `evaluations` by role: teacher, control (unless --no_control)
        and student.
        """
        results = self.results(
            run,
            f"{self.data.name} {'-'.join(self.data.languages)}",
            {role: evaluation.entry for role, evaluation in evaluations.items()},
            measurements={role: evaluation.measurement for role, evaluation in evaluations.items()},
            method=self.method_name,
            metric="bleu",  # of greedy decoding, the fastest one
            decoding={role: evaluation.seconds for role, evaluation in evaluations.items()},
            sacrebleu=evaluations["student"].signatures,
        )
        example = self.args.source_prefix + self.data.splits["validation"]["source"][0]
        usage = USAGE.format(sentence=json.dumps(example, ensure_ascii=False))
        run.finish(results, student, card_of(run, usage, "translation", KNOWN), self.tokenizer)
        if PartialState().is_main_process:  # BLEU is computed only after training, so the curve shows token accuracy
            curve = results | {"primary_metric": {"split": "validation", "name": "token_accuracy"}}
            plot_curves(run.folder / "curves.png", run.history, curve)


def teacher_forced_metrics(translator: Generator, rows: Dataset) -> dict[str, float]:
    """token_accuracy and perplexity of the reference tokens, each predicted from the reference tokens before it."""
    model, collate = translator.model, TranslationCollator(translator.tokenizer, translator.model)

    def with_targets(features: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = collate(features)
        return batch | {"targets": batch["labels"]}  # labels are not passed to models

    def call(targets: Tensor, **batch: Tensor) -> dict[str, Tensor]:
        return {"counts": token_counts(model(**batch).logits, targets)}

    counts = run_inference(model, call, rows, with_targets, description="evaluating")["counts"]
    return token_metrics(torch.stack(counts).numpy())


def seconds_per_100(translator: Generator, rows: Dataset, beams: int) -> float:
    """Seconds to translate 100 sentences one at a time, measured on TIMED of the rows."""
    few = rows.select(range(0, len(rows), -(-len(rows) // TIMED)))
    started = time.perf_counter()
    translate(translator, few, beams, batch_size=1)
    return 100 * (time.perf_counter() - started) / len(few)


def median_pair(translator: Generator, rows: Dataset) -> dict[str, Tensor]:
    """The inputs of a sentence pair of median length, for measuring latency and FLOPs of a forward pass."""
    middle = int(np.argsort(rows["length"], kind="stable")[len(rows) // 2])
    batch = TranslationCollator(translator.tokenizer, translator.model)([rows[middle]])
    return {name: value.to(translator.model.device) for name, value in batch.items() if name not in NOT_INPUTS}
