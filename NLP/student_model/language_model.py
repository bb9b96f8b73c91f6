"""Distillation of a causal language model into a smaller one: who is trained on what, and the report at the end."""

import copy
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kd.common.losses import jensen_shannon, soft_target_kl
from kd.common.methods import Method
from kd.common.metrics.chance import language_warning
from kd.common.metrics.language import language_metrics, token_counts
from kd.common.objective import IGNORED, Divergence, Objective, logit_term, task_loss
from kd.common.pretrained import load_tokenizer, stage_loader
from kd.common.training.arguments import KDTrainingArguments
from kd.common.training.run import TrainerRun
from kd.common.utils.errors import UserError
from kd.nlp.data.corpora import Corpus, pack, stack
from kd.nlp.student_model.language_evaluation import (
    continuation,
    continuation_length,
    evaluate,
    first_words,
    labels_of,
    one_line,
)
from kd.nlp.student_model.layers import check_cut, cut_layers, layer_paths
from kd.nlp.student_model.methods import hidden_states, layer_pairs, width
from kd.nlp.student_model.pipeline import switch_off_dropout
from kd.nlp.teacher_model.causal import SCRATCH, byte_level_bpe, load_language_model, random_gpt2
from kd.nlp.teacher_model.teacher import models_and_tokenizers

CUT = "cut"
Choices = dict[str, np.ndarray]  # the most probable next tokens, by split
METHODS = {"forward": "forward_kl", "reverse": "reverse_kl", "js": "jensen_shannon"}
USAGE = """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}")
model = AutoModelForCausalLM.from_pretrained("{folder}").eval()
ids = model.generate(**tokenizer({prompt}, return_tensors="pt"), max_new_tokens={new}, do_sample=False)
print(tokenizer.decode(ids[0]))"""


class LanguageDistillation:
    """Teacher, control and student of one run. `args` are those of scripts/distill_gpt.py."""

    def __init__(self, args: Any, training: KDTrainingArguments, corpus: Corpus) -> None:
        self.args, self.corpus = args, corpus
        self.given = None if args.teacher == SCRATCH else load_language_model(args.teacher, args.block_size)
        by_name = args.student not in (SCRATCH, CUT)
        self.given_student = load_language_model(args.student, args.block_size) if by_name else None
        self._refuse_what_cannot_fit()
        self.run = TrainerRun(training, args)
        starts = {"teacher": self.given, "student": self.given_student}
        self.run.check_inputs(corpus.fingerprint, **models_and_tokenizers(starts))
        self.tokenizer = self.given.tokenizer if self.given else self._learn_tokenizer()
        self.measured: tuple[dict[str, Any], Choices] | None = None
        self.blocks = {split: pack(texts, self.tokenizer, args.block_size) for split, texts in corpus.splits.items()}

    def _refuse_what_cannot_fit(self) -> None:
        """Before anything is written, and before hours of training rather than after."""
        args, given, own = self.args, self.given, self.given_student
        if own and (given is None or not own.speaks_like(given)):
            raise UserError(
                f"student {args.student} and teacher {args.teacher} have different vocabularies: pass --student "
                f"{SCRATCH} or {CUT}, or a student with the teacher's tokenizer"
            )
        layers = len(layer_paths(given.model)) if given else args.teacher_layers
        if args.student == CUT and args.student_layers > layers:
            raise UserError(f"--student_layers {args.student_layers} cannot be cut from the teacher's {layers}")
        if args.student == CUT and given:
            check_cut(given.model, args.student_layers)
        if args.hidden_weight:
            layer_pairs("uniform", len(layer_paths(own.model)) if own else args.student_layers, layers)

    def _learn_tokenizer(self) -> PreTrainedTokenizerBase:
        """A stage, so that a run that is continued has the vocabulary that it started with."""
        train, size, positions = self.corpus.splits["train"], self.args.vocabulary_size, self.args.block_size
        return self.run.stage(
            "tokenizer", lambda: byte_level_bpe(train, size, positions), stage_loader(AutoTokenizer, load_tokenizer)
        )

    # ---- who is trained on what ----

    def teacher(self) -> PreTrainedModel:
        """The teacher, measured before it teaches: one that is no better than guessing is called out."""
        teacher = self._make_teacher()
        entry, _ = self.measured = self._evaluate("teacher", teacher, None)
        perplexity, vocabulary = entry["metrics"]["validation"]["perplexity"], teacher.config.vocab_size
        tokens = {split: labels[labels != IGNORED] for split in ("train", "validation")
                  for labels in [labels_of(self.blocks[split])]}  # fmt: skip
        self.run.warn(language_warning(entry["name"], perplexity, tokens["train"], tokens["validation"], vocabulary))
        return teacher

    def _make_teacher(self) -> PreTrainedModel:
        """Trained on the corpus: from random weights, or from what was given, which may also stay as it is."""
        args = self.args
        if self.given and args.teacher_epochs == 0:
            return self.given.model

        def build() -> PreTrainedModel:
            if self.given:
                model = copy.deepcopy(self.given.model)  # the control is cut from what was given
            else:
                model = self._random(args.teacher_layers, args.teacher_width)
            rate = self._rate(from_scratch=self.given is None)
            return self._train("teacher", model, rate, num_train_epochs=args.teacher_epochs)

        return self._stage("teacher", build)

    def control(self) -> PreTrainedModel:
        """The student without the teacher: cut from the model *as it came* (or as random, or as named, as the student
        is), the same number of updates, labels only.
        """
        source = self.given.model if self.given else None
        return self._stage("control", lambda: self._train("control", self._start(source), self._student_rate))

    def student(self, teacher: PreTrainedModel) -> PreTrainedModel:
        """Cut from the trained teacher (or random, or named) and taught by its distributions over next tokens."""
        return self._stage(
            "student", lambda: self._train("student", self._start(teacher), self._student_rate, teacher=teacher)
        )

    def _start(self, source: PreTrainedModel | None) -> PreTrainedModel:
        """What a student is before it learns; `source` is what a cut is made of, None what has only random weights."""
        args = self.args
        if self.given_student:
            return copy.deepcopy(self.given_student.model)
        if args.student == CUT and source is not None:
            student = cut_layers(source, args.student_layers)
            student.generation_config = copy.deepcopy(source.generation_config)
            return student
        return self._random(args.student_layers, args.teacher_width if args.student == CUT else args.student_width)

    def _random(self, layers: int, width: int) -> PreTrainedModel:
        args = self.args
        vocabulary = self.given.model.config.vocab_size if self.given else len(self.tokenizer)
        return random_gpt2(vocabulary, self.tokenizer.eos_token_id, layers, width, args.block_size, args.dropout)

    def _rate(self, from_scratch: bool) -> float:
        return self.args.scratch_learning_rate if from_scratch else self.run.args.learning_rate

    @property
    def _student_rate(self) -> float:
        return self._rate(self.args.student == SCRATCH or (self.args.student == CUT and self.given is None))

    def _stage(self, name: str, build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        return self.run.stage(name, build, stage_loader(AutoModelForCausalLM), self.tokenizer)

    def _train(
        self, name: str, model: PreTrainedModel, rate: float, teacher: PreTrainedModel | None = None, **settings: Any
    ) -> PreTrainedModel:
        """On the tokens of train, and with a teacher (then without dropout) on its distributions over them too."""
        args, validation = self.run.args, self.blocks["validation"]
        inside = Method({})
        if teacher is not None:
            switch_off_dropout(model)
            if self.args.hidden_weight:
                inside = hidden_states(model, teacher, self.args.hidden_weight)
        divergence = divergence_of(self.args.divergence, args.temperature, self.args.js_beta)
        return self.run.train(
            name,
            model,
            {"learning_rate": rate, "train_sampling_strategy": "random"} | settings,
            objective=objective(
                1.0 if teacher is None else args.alpha, divergence, inside, args.label_smoothing_factor
            ),
            features=inside.features,
            teacher=teacher,
            teacher_features=inside.teacher_features,
            train_dataset=self.blocks["train"],
            eval_dataset=validation,
            data_collator=stack,
            preprocess_logits_for_metrics=token_counts,  # (batch, positions, vocabulary) are too many to gather
            compute_metrics=lambda prediction: language_metrics(
                np.asarray(prediction.predictions), self.corpus.size("validation")
            ),
        )

    # ---- what it was worth ----

    def report(self, teacher: PreTrainedModel, control: PreTrainedModel | None, student: PreTrainedModel) -> None:
        """Measures all three on every split but train and writes what the run has to show."""
        models, choices, samples = {}, None, {}
        prompt = first_words(self.corpus, self.tokenizer, self.args.block_size)
        new = continuation_length(self.args.block_size)
        for role, model in (("teacher", teacher), ("control", control), ("student", student)):
            if model is not None:
                known = self.measured if role == "teacher" else None
                models[role], said = known or self._evaluate(role, model, choices)
                choices = choices or said  # the teacher's, with which the others are compared
                samples[role] = continuation(model, self.tokenizer, prompt, new)
        results = self._results(models, sample={"prompt": one_line(prompt)} | samples)
        quoted = json.dumps(prompt, ensure_ascii=False)
        usage = USAGE.format(folder=self.run.folder / "student", prompt=quoted, new=new)
        card = {"library_name": "transformers", "pipeline_tag": "text-generation"}
        self.run.finish(results, student, usage, self.tokenizer, **card)

    def _evaluate(self, role: str, model: PreTrainedModel, choices: Choices | None) -> tuple[dict[str, Any], Choices]:
        batch_size = self.run.args.per_device_eval_batch_size
        return evaluate(self._name(role, model), model, self.corpus, self.blocks, batch_size, choices)

    def _name(self, role: str, model: PreTrainedModel) -> str:
        if role == "teacher" and self.given:
            return str(self.args.teacher)
        shape = f"{model.config.model_type} {len(layer_paths(model))}x{width(model)}"
        return f"{shape}, labels only" if role == "control" else shape

    def _results(self, models: dict[str, Any], **extra: Any) -> dict[str, Any]:
        sizes = {split: len(self.blocks[split]) if split in self.blocks else None
                 for split in ("train", "validation", "test")}  # fmt: skip
        tokens = {split: int((labels_of(blocks) != IGNORED).sum()) for split, blocks in self.blocks.items()}
        return self.run.results(
            domain="NLP",
            task=self.corpus.name,
            method=METHODS[self.args.divergence] + ("_hidden" if self.args.hidden_weight else ""),
            data={**sizes, "fingerprint": self.corpus.fingerprint},
            models=models,
            split="validation",
            metric="perplexity",
            lower_is_better=True,
            selection=self.run.args.selection,
            data_notes="; ".join(self.corpus.notes) or "none",
            corpus={"tokens": tokens, "bytes": {split: self.corpus.size(split) for split in self.blocks}},
            **extra,
        )


def divergence_of(name: str, temperature: float, js_beta: float) -> Divergence:
    """Between the distributions of student and teacher over one next token: forward or reverse KL, or generalised
    Jensen-Shannon.
    """
    if name == "js":
        return partial(jensen_shannon, temperature=temperature, beta=js_beta)
    return partial(soft_target_kl, temperature=temperature, direction=name)


def objective(alpha: float, divergence: Divergence, inside: Method, smoothing: float = 0.0) -> Objective:
    """alpha * labels, smoothed, + (1 - alpha) * the teacher's distributions, both means over the tokens, + what is to
    match inside, a mean over all positions.
    """
    task = task_loss(smoothing=smoothing)
    return Objective(
        task=(alpha, task), tokens=(1 - alpha, logit_term(divergence, ignore_unlabelled=True)), **inside.terms
    )
