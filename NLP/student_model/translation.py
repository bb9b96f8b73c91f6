"""One distillation from a translation teacher to a student: who is trained on what, and the report at the end.

Word-level: the teacher's distribution over each next token; sequence-level: the teacher's own translations as targets
(Kim and Rush, "Sequence-Level Knowledge Distillation", arXiv:1606.07947).
"""

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kd.common.losses import soft_target_kl
from kd.common.metrics.chance import language_warning
from kd.common.metrics.language import token_counts, token_metrics
from kd.common.objective import Objective, logit_term, task_loss
from kd.common.pretrained import load_tokenizer, stage_loader
from kd.common.reporting.plots import plot_curves
from kd.common.training.arguments import KDTrainingArguments
from kd.common.training.run import TrainerRun
from kd.common.training.teacher_outputs import cache_outputs, dataset_hash, outputs_key
from kd.common.utils.errors import UserError
from kd.nlp.data.tokenized import Collator
from kd.nlp.data.translation import PairCollator, TranslationData, tokenize_pairs
from kd.nlp.student_model.translation_evaluation import evaluate
from kd.nlp.teacher_model.seq2seq import (
    SCRATCH,
    Translator,
    beam_search,
    cut_layers,
    joint_bpe,
    load_translator,
    marian,
    number_of_layers,
    special_ids_of,
)
from kd.nlp.teacher_model.teacher import models_and_tokenizers

CUT = "cut"
Measured = tuple[dict[str, Any], dict[str, float], dict[str, str]]  # what `evaluate` returns
USAGE = """from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}")
model = AutoModelForSeq2SeqLM.from_pretrained("{folder}").eval()
ids = model.generate(**tokenizer({sentence}, return_tensors="pt"))  # greedy, unless num_beams is more than 1
print(tokenizer.decode(ids[0], skip_special_tokens=True))"""


class TranslationDistillation:
    """Teacher, control and student of one run. `args` are those of scripts/distill_translation.py."""

    def __init__(self, args: Any, training: KDTrainingArguments, data: TranslationData) -> None:
        self.args, self.data = args, data
        self.given = None if args.teacher == SCRATCH else load_translator(args.teacher, args.max_length)
        by_name = args.student not in (SCRATCH, CUT)
        self.given_student = load_translator(args.student, args.max_length) if by_name else None
        self._refuse_what_cannot_fit()
        self.run = TrainerRun(training, args)
        starts = {"teacher": self.given, "student": self.given_student}
        self.run.check_inputs(data.fingerprint, **models_and_tokenizers(starts))
        self.tokenizer = self.given.tokenizer if self.given else self._learn_tokenizer()
        self.measured: Measured | None = None
        self.splits = tokenize_pairs(data, self.tokenizer, args.source_prefix)

    def _refuse_what_cannot_fit(self) -> None:
        """Before anything is written, and before hours of training rather than after."""
        args, given, own = self.args, self.given, self.given_student
        if args.student == CUT:
            layers = number_of_layers(given.model) if given else (args.teacher_layers, args.teacher_layers)
            for side, kept, number in zip(("encoder", "decoder"), self._student_layers, layers, strict=True):
                if kept > number:
                    raise UserError(f"--student_{side}_layers {kept} cannot be cut from the teacher's {number}")
        if own and (given is None or not _same_vocabulary(own, given)):
            raise UserError(
                f"student {args.student} and teacher {args.teacher} have different vocabularies: pass --student "
                f"{SCRATCH} or {CUT}, or a student with the teacher's tokenizer"
            )

    def _learn_tokenizer(self) -> PreTrainedTokenizerBase:
        """A stage, so that a run that is continued has the vocabulary that it started with."""
        train = self.data.splits["train"]
        texts = [*train["source"], *train["target"]]
        return self.run.stage(
            "tokenizer",
            lambda: joint_bpe(texts, self.args.vocabulary_size, self.args.max_length),
            stage_loader(AutoTokenizer, load_tokenizer),
        )

    @property
    def _student_layers(self) -> tuple[int, int]:
        return self.args.student_encoder_layers, self.args.student_decoder_layers

    # ---- who is trained on what ----

    def teacher(self) -> PreTrainedModel:
        """The teacher, measured before it teaches: one that is no better than guessing is called out."""
        teacher = self._make_teacher()
        entry, *_ = self.measured = self._evaluate("teacher", teacher)
        perplexity, vocabulary = entry["metrics"]["validation"]["perplexity"], teacher.config.vocab_size
        train, tokens = (np.concatenate(self.splits[split]["labels"][:]) for split in ("train", "validation"))
        self.run.warn(language_warning(entry["name"], perplexity, train, tokens, vocabulary))
        return teacher

    def _make_teacher(self) -> PreTrainedModel:
        """Trained on the data: from random weights, or from what was given, which may also stay as it is."""
        args = self.args
        if self.given and args.teacher_epochs == 0:
            return self.given.model

        def build() -> PreTrainedModel:
            model = self._as_it_came()
            rate = args.teacher_learning_rate or self.run.args.learning_rate
            return self._train("teacher", model, self.splits["train"], num_train_epochs=args.teacher_epochs,
                               learning_rate=rate)  # fmt: skip

        return self._stage("teacher", build)

    def control(self, teacher: PreTrainedModel) -> PreTrainedModel:
        """The student without the teacher: the same start, but for a cut, which is one of the model *as it came*; the
        same number of updates, labels only.
        """

        def build() -> PreTrainedModel:
            source = self._as_it_came() if self.args.student == CUT else teacher
            return self._train("control", self._new_student(source), self.splits["train"])

        return self._stage("control", build)

    def student(self, teacher: PreTrainedModel) -> PreTrainedModel:
        """Trained on the teacher's distributions (word), its translations (sequence), or both."""
        method = self.args.method

        def build() -> PreTrainedModel:
            model = self._new_student(teacher)
            train = self.splits["train"] if method == "word" else self._translated_by(teacher)
            return self._train("student", model, train, None if method == "sequence" else teacher)

        return self._stage("student", build)

    def _stage(self, name: str, build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        return self.run.stage(name, build, stage_loader(AutoModelForSeq2SeqLM), self.tokenizer)

    def _as_it_came(self) -> PreTrainedModel:
        """The teacher before it was trained here."""
        if self.given:
            return copy.deepcopy(self.given.model)
        args, tokenizer = self.args, self.tokenizer
        ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "eos_token_id")}
        ids["decoder_start_token_id"] = ids["pad_token_id"]
        layers = args.teacher_layers
        return marian(len(tokenizer), ids, args.teacher_width, layers, layers, args.dropout, args.max_length)

    def _new_student(self, source: PreTrainedModel) -> PreTrainedModel:
        """What a student is before it learns; a cut is made of `source`."""
        args = self.args
        if self.given_student:
            return copy.deepcopy(self.given_student.model)
        if args.student == CUT:
            return cut_layers(source, *self._student_layers)
        vocabulary, ids = source.config.vocab_size, special_ids_of(source)
        return marian(vocabulary, ids, args.student_width, *self._student_layers, args.dropout, args.max_length)

    def _train(
        self,
        name: str,
        model: PreTrainedModel,
        train: Dataset,
        teacher: PreTrainedModel | None = None,
        **settings: Any,
    ) -> PreTrainedModel:
        """On the labels of `train`, and with a teacher on its distributions over them too."""
        args = self.run.args
        return self.run.train(
            name,
            model,
            settings,
            objective=word_level(
                1.0 if teacher is None else args.alpha, args.temperature, args.label_smoothing_factor
            ),
            teacher=teacher,
            train_dataset=train,
            eval_dataset=self.splits["validation"],
            data_collator=PairCollator(self.tokenizer, model),
            preprocess_logits_for_metrics=token_counts,  # (batch, positions, vocabulary) are too many to gather
            compute_metrics=lambda prediction: token_metrics(np.asarray(prediction.predictions)),
        )

    def _translated_by(self, teacher: PreTrainedModel) -> Dataset:
        """The training split with the teacher's translations as labels."""
        folder, precision = self.run.folder / "teacher_outputs", self.run.args.precision
        with self.run.timed("teacher_outputs"):
            return with_translations(
                self.splits["train"], Translator(teacher, self.tokenizer), folder, self.args.beams, precision
            )

    # ---- what it was worth ----

    def report(self, teacher: PreTrainedModel, control: PreTrainedModel | None, student: PreTrainedModel) -> None:
        """Measures all three on every split but train and writes what the run has to show."""
        models: dict[str, Any] = {}
        decoding: dict[str, Any] = {}
        signature: dict[str, str] = {}
        for role, model in (("teacher", teacher), ("control", control), ("student", student)):
            if model is not None:
                known = self.measured if role == "teacher" else None
                models[role], decoding[role], signature = known or self._evaluate(role, model)
        results = self._results(models, decoding=decoding, sacrebleu=signature)
        example = self.args.source_prefix + self.data.splits["validation"]["source"][0]
        usage = USAGE.format(folder=self.run.folder / "student", sentence=json.dumps(example, ensure_ascii=False))
        card = {"library_name": "transformers", "pipeline_tag": "translation"}
        self.run.finish(results, student, usage, self.tokenizer, **card)
        if PartialState().is_main_process:  # over the curve of BLEU, which there is none of: it is of the end only
            curve = results | {"primary_metric": {"split": "validation", "name": "token_accuracy"}}
            plot_curves(self.run.folder / "curves.png", self.run.history, curve)

    def _evaluate(self, role: str, model: PreTrainedModel) -> Measured:
        translator = Translator(model, self.tokenizer)
        return evaluate(self._name(role, model), translator, self.data, self.splits, self.args.beams)

    def _name(self, role: str, model: PreTrainedModel) -> str:
        if role == "teacher" and self.given:
            return str(self.args.teacher)
        layers = "+".join(map(str, number_of_layers(model)))
        return f"{model.config.model_type} of {layers} layers, width {model.config.hidden_size}"

    def _results(self, models: dict[str, Any], **extra: Any) -> dict[str, Any]:
        sizes = {split: len(self.splits[split]) if split in self.splits else None
                 for split in ("train", "validation", "test")}  # fmt: skip
        return self.run.results(
            domain="NLP",
            task=f"{self.data.name} {'-'.join(self.data.languages)}",
            method=self.args.method,
            data={**sizes, "fingerprint": self.data.fingerprint},
            models=models,
            split="validation",
            metric="bleu",  # greedy: a student is made to be fast, and that is the fast way to decode
            selection=self.run.args.selection,
            data_notes="; ".join(self.data.notes) or "none",
            **extra,
        )


def with_translations(
    rows: Dataset, translator: Translator, folder: str | Path, beams: int, precision: str
) -> Dataset:
    """The rows with the translator's own translations as labels, computed once and cached in a folder by sample id."""
    model, tokenizer = translator
    sources = rows.select_columns(["sample_id", "input_ids", "attention_mask", "length"])
    key = outputs_key(model, dataset_hash(sources), beams, model.generation_config.max_length, precision)
    translations = cache_outputs(
        model, beam_search(model, beams), sources, Collator(tokenizer), folder, key, precision
    )

    def relabel(batch: dict[str, list]) -> dict[str, list]:
        labels = translations.feature("tokens", torch.tensor(batch["sample_id"]))
        lengths = [len(source) + len(target) for source, target in zip(batch["input_ids"], labels, strict=True)]
        return {"labels": [tokens.tolist() for tokens in labels], "length": lengths}

    return rows.map(relabel, batched=True, load_from_cache_file=False, new_fingerprint=key)


def _same_vocabulary(first: Translator, second: Translator) -> bool:
    return (
        first.tokenizer.get_vocab() == second.tokenizer.get_vocab()
        and first.model.config.vocab_size == second.model.config.vocab_size
        and special_ids_of(first.model) == special_ids_of(second.model)
    )


def word_level(alpha: float, temperature: float, smoothing: float) -> Objective:
    """alpha * labels + (1 - alpha) * the teacher's distributions over next tokens, both means over the tokens."""
    words = logit_term(partial(soft_target_kl, temperature=temperature), ignore_unlabelled=True)
    return Objective(task=(alpha, task_loss(smoothing=smoothing)), words=(1 - alpha, words))
