"""Distillation of a sentence encoder: its inputs, the stages control and student, evaluation and report."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from transformers import set_seed

from kd.common.data.fingerprints import data_fingerprint, dataset_hash, outputs_key
from kd.common.data.sources import hub_dataset, print_notes
from kd.common.methods import Method
from kd.common.reporting.model_card import Card
from kd.common.training.arguments import KDTrainingArguments
from kd.common.training.inference import Collate
from kd.common.training.teacher_outputs import TeacherOutputs, cache_outputs
from kd.common.training.trainer_run import TrainerRun
from kd.common.utils.errors import UserError
from kd.nlp.data.loading import KNOWN, TextData
from kd.nlp.data.sentences import Sentences, load_pairs, load_sentences, tokenize
from kd.nlp.student_model.layers import (
    alternating_layers,
    cut_layers,
    disable_dropout,
    kept_layers,
    set_dropout,
)
from kd.nlp.student_model.narrow import channel_importance, check_narrow, narrow
from kd.nlp.student_model.sentence_encoder import SentenceEncoder, load_sentence_encoder, tiny_sentence_encoder
from kd.nlp.student_model.sentence_evaluation import METRIC, Evaluation, evaluate, measure, validation_split
from kd.nlp.student_model.sentence_methods import (
    EMBEDDING,
    EmbeddingPair,
    parse_methods,
    simcse,
    two_views,
)
from kd.nlp.student_model.training import set_trainable
from kd.nlp.teacher_model import TINY_BERT
from kd.nlp.teacher_model.teacher import models_and_tokenizers

IMPORTANCE_TEXTS = 512  # the channels of a narrower student are chosen by the hidden states of so many texts

USAGE = """from sentence_transformers import SentenceTransformer

folder = "student"  # the path of this model, or its name on the Hub
model = SentenceTransformer(folder)
embeddings = model.encode(["A man is eating.", "Someone has a meal.", "The sun is shining."])
print(model.similarity(embeddings, embeddings))  # cosine similarities"""


@dataclass(frozen=True)
class SentenceTask:
    """The data and the teacher of a run, with the arguments of the script for `data` and for the student (`args`)."""

    data: Any
    args: Any
    teacher: SentenceEncoder
    sentences: Sentences
    pairs: TextData

    @classmethod
    def load(cls, data: Any, args: Any) -> "SentenceTask":
        """Loads data and teacher, and prints what was inferred. Raises UserError if they cannot be used together."""
        parse_methods(args.method)
        named = None if args.teacher == TINY_BERT else load_sentence_encoder(args.teacher, data.max_length)
        pairs = load_pairs(data.dataset, data.text_columns, data.label_column, data.max_eval_samples)
        sentences = load_sentences(data.texts, data.texts_columns, data.dataset, data.max_train_samples)
        set_seed(0)  # the weights of an embedded teacher are the same for every seed
        teacher = named or tiny_sentence_encoder(sentences.texts, data.max_length)
        task = cls(data, args, teacher, sentences, pairs)
        task._check_student()
        print_notes(pairs.name, pairs.notes)
        print_notes("texts", sentences.notes)
        print_notes(args.teacher, teacher.notes)
        return task

    def _check_student(self) -> None:
        """Raises UserError for a student that cannot be cut from the teacher."""
        model, kept = self.teacher.model, self.args.kept_layers
        layers = model.config.num_hidden_layers
        if kept and (sorted(set(kept)) != kept or kept[-1] >= layers):
            raise UserError(
                f"--kept_layers must be layers of the teacher in order, from 0 to {layers - 1}, got "
                f"{' '.join(map(str, kept))}"
            )
        kept_layers(model, len(self.kept))
        if self.args.student_width:
            check_narrow(model, self.args.student_width)

    def open_run(self, training: KDTrainingArguments) -> TrainerRun:
        """Opens the output folder for a new run, or continues the run in it. Raises UserError if that run started from
        other data or another teacher.
        """
        run = TrainerRun(training, self.data, self.args)
        fingerprint = data_fingerprint([self.pairs.fingerprint, self.sentences.fingerprint])
        run.check_inputs(fingerprint, **models_and_tokenizers({"teacher": self.teacher}))
        return run

    # ---- models ----

    @property
    def kept(self) -> Sequence[int]:
        """The layers of the teacher that the student starts from."""
        layers = self.teacher.model.config.num_hidden_layers
        return self.args.kept_layers or alternating_layers(self.args.student_layers, layers)

    @property
    def student_name(self) -> str:
        width = f", width {self.args.student_width}" if self.args.student_width else ""
        return f"layers {' '.join(map(str, self.kept))}{width}"

    @cached_property
    def untrained(self) -> SentenceEncoder:
        """The student before training: some layers of the teacher, perhaps narrower."""
        teacher = self.teacher
        model = cut_layers(teacher.model, len(self.kept), self.kept)
        if width := self.args.student_width:
            rows = self.train.select(range(min(len(self.train), IMPORTANCE_TEXTS)))
            model = narrow(model, width, channel_importance(model, rows, teacher.collate))
        return SentenceEncoder(model, teacher.tokenizer, teacher.pooling)

    @cached_property
    def train(self) -> Dataset:
        return tokenize(self.sentences.texts, self.teacher.tokenizer)

    # ---- stages ----

    def train_control(self, run: TrainerRun) -> SentenceEncoder:
        """The stage `control`: the student's network, texts and number of updates, without the teacher: SimCSE."""

        def build() -> SentenceEncoder:
            control = copy.deepcopy(self.untrained)
            set_dropout(control.model, self.args.dropout)
            method = simcse(control.pooling, run.args.temperature)
            rate = self.args.control_learning_rate
            return self._train(run, "control", control, method, rate, two_views(control.collate))

        return run.stage("control", build, load_sentence_encoder)

    def train_student(self, run: TrainerRun) -> SentenceEncoder:
        """The stage `student`: trains on the teacher's embeddings, without dropout."""

        def build() -> SentenceEncoder:
            student = copy.deepcopy(self.untrained)
            disable_dropout(student.model)
            widths = student.model.config.hidden_size, self.teacher.model.config.hidden_size
            method = parse_methods(self.args.method)(EmbeddingPair(*widths, student.pooling))
            outputs = {"teacher_outputs": self._teacher_outputs(run)}
            return self._train(run, "student", student, method, run.args.learning_rate, student.collate, **outputs)

        return run.stage("student", build, load_sentence_encoder)

    def _train(
        self,
        run: TrainerRun,
        name: str,
        encoder: SentenceEncoder,
        method: Method,
        rate: float,
        collate: Collate,
        **teacher: Any,
    ) -> SentenceEncoder:
        model = encoder.model
        set_trainable(model, freeze_embeddings=not self.args.student_width)
        if (pooler := getattr(model, "pooler", None)) is not None:
            pooler.requires_grad_(False)  # the embedding does not depend on it
        run.train(
            name,
            model,
            {"learning_rate": rate},
            objective=method.objective,
            features=method.features,
            train_dataset=self.train,
            data_collator=collate,
            **teacher,
        )
        return encoder

    def _teacher_outputs(self, run: TrainerRun) -> TeacherOutputs:
        """The teacher's embeddings of the training texts, computed once for all seeds."""
        teacher, precision = self.teacher, run.args.precision
        folder = (run.shared or run.folder) / "teacher_outputs"
        key = outputs_key(teacher.model, dataset_hash(self.train), precision, teacher.pooling, EMBEDDING)
        with run.timed("teacher_outputs"):
            return cache_outputs(
                teacher.model,
                lambda **batch: {EMBEDDING: teacher.embedding(**batch).float()},
                self.train,
                teacher.collate,
                folder,
                key,
                precision,
            )

    # ---- evaluation and report ----

    def evaluate(self, encoder: SentenceEncoder, name: str, teacher: Evaluation | None = None) -> Evaluation:
        return evaluate(name, encoder, self.pairs, teacher)

    def report(self, run: TrainerRun, evaluations: dict[str, Evaluation], student: SentenceEncoder) -> None:
        """Writes the results and the student's folder. `evaluations` by role."""
        if not PartialState().is_main_process:
            return
        pairs, split = self.pairs, validation_split(self.pairs)
        sizes = {name: len(rows) for name, rows in pairs.splits.items()}
        results = run.results(
            domain="NLP",
            task=pairs.name,
            method=self.args.method,
            data={
                "train": len(self.train),
                "validation": sizes[split],
                "test": sizes.get("test"),
                "units": {"train": "texts", "validation": "pairs", "test": "pairs"},
                "fingerprint": data_fingerprint([pairs.fingerprint, self.sentences.fingerprint]),
            },
            models={role: entry for role, (entry, _) in evaluations.items()},
            split=split,
            metric=METRIC,
            measurements={role: measure(pairs, found) for role, (_, found) in evaluations.items()},
            shared_by_all_seeds="the teacher",
            pooling=student.pooling,
            data_notes="; ".join([*pairs.notes, *self.sentences.notes]),
            model_notes="; ".join(self.teacher.notes) or "none",
        )
        card = Card(
            USAGE,
            library_name="sentence-transformers",
            pipeline_tag="sentence-similarity",
            dataset=hub_dataset(self.data.dataset, KNOWN),
            origins=[] if self.args.teacher == TINY_BERT else [self.args.teacher],
            tags=["sentence-transformers", "feature-extraction"],
        )
        run.finish(results, student, card)
