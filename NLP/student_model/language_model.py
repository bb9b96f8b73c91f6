"""Distillation of a causal language model: models, training, evaluation and report."""

import copy
import json
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from kd.common.methods import Method
from kd.common.metrics.cost import cost
from kd.common.metrics.quality import language_metrics, token_counts, unigram_perplexity
from kd.common.metrics.verdict import Measurement, measure_perplexity
from kd.common.training.arguments import KDTrainingArguments
from kd.common.training.inference import NOT_INPUTS, Collate, run_inference
from kd.common.training.trainer_run import TrainerRun
from kd.common.utils.errors import UserError
from kd.common.utils.tasks import IGNORED
from kd.nlp.data.corpora import KNOWN, Corpus, pack, stack
from kd.nlp.data.vocabularies import check_text_kept
from kd.nlp.student_model.arguments import CUT, VOCABULARY_METHODS
from kd.nlp.student_model.cards import card_of
from kd.nlp.student_model.generation import (
    GenerationTask,
    Splits,
    check_same_vocabulary,
    label_tokens,
)
from kd.nlp.student_model.layers import cut_layers, disable_dropout, kept_layers, layer_paths
from kd.nlp.student_model.methods import hidden_states, layer_pairs, width
from kd.nlp.teacher_model import SCRATCH
from kd.nlp.teacher_model.generative import Generator, byte_level_bpe, load_language_model, random_gpt2

PROMPT, CONTINUATION = 12, 30  # tokens of the sample in the report
USAGE = """from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "student"  # the path of this model, or its name on the Hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder).eval()
ids = model.generate(**tokenizer({prompt}, return_tensors="pt"), max_new_tokens={new}, do_sample=False)
print(tokenizer.decode(ids[0]))"""


def load_named_models(args: Any) -> tuple[Generator | None, Generator | None]:
    """The models of --teacher and --student; None for `scratch` and `cut`. `args` are those of distill_gpt.py.

    Raises UserError if this student cannot be distilled from this teacher.
    """
    teacher = None if args.teacher == SCRATCH else load_language_model(args.teacher, args.block_size)
    student = None if args.student in (SCRATCH, CUT) else load_language_model(args.student, args.block_size)
    if args.across_vocabularies:
        for name, model in ((args.teacher, teacher), (args.student, student)):
            if model is not None:
                check_text_kept(name, model.tokenizer)
    else:
        check_same_vocabulary(args, student, teacher, VOCABULARY_METHODS)
    layers = len(layer_paths(teacher.model)) if teacher else args.teacher_layers
    if args.student == CUT and args.student_layers > layers:
        raise UserError(f"--student_layers {args.student_layers} cannot be cut from the teacher's {layers}")
    if args.student == CUT and teacher:
        kept_layers(teacher.model, args.student_layers)  # raises UserError
    if args.hidden_weight:
        layer_pairs("uniform", len(layer_paths(student.model)) if student else args.student_layers, layers)
    return teacher, student


class LanguageEvaluation(NamedTuple):
    """A model's entry in results.json, its most probable tokens (labels,) by split, and the measurement of the primary
    metric on validation.
    """

    entry: dict[str, Any]
    choices: dict[str, np.ndarray]
    measurement: Measurement


class Sample(NamedTuple):
    """A prompt as text and as tokens, and the maximum number of tokens to generate after it."""

    prompt: str
    ids: list[int]
    new: int


class LanguageTask(GenerationTask):
    """The distillation of a language model. `data` is a Corpus; `splits` contain its blocks of tokens."""

    auto_class: ClassVar[Any] = AutoModelForCausalLM

    @staticmethod
    def learn_tokenizer(args: Any, data: Corpus) -> PreTrainedTokenizerBase:
        return byte_level_bpe(data.splits["train"], args.vocabulary_size, args.block_size)

    @staticmethod
    def tokenize(args: Any, data: Corpus, tokenizer: PreTrainedTokenizerBase) -> Splits:
        return {split: pack(texts, tokenizer, args.block_size) for split, texts in data.splits.items()}

    def distill(self, run: TrainerRun) -> None:
        """Trains and evaluates the teacher, then control and student for each seed, and writes the reports."""
        teacher = self.train_teacher(run)
        measured_teacher = self.evaluate(run, "teacher", teacher)
        for seed_run in run.each_seed():
            models, evaluations = {"teacher": teacher}, {"teacher": measured_teacher}
            if not run.args.no_control:
                models["control"] = self.train_control(seed_run, teacher)
                evaluations["control"] = self.evaluate(seed_run, "control", models["control"], measured_teacher)
            models["student"] = self.train_student(seed_run, teacher)
            evaluations["student"] = self.evaluate(seed_run, "student", models["student"], measured_teacher)
            self.report(seed_run, evaluations, models)
        run.summarize()

    # ---- models ----

    def initial_teacher(self) -> PreTrainedModel:
        if self.pretrained_teacher is not None:
            return copy.deepcopy(self.pretrained_teacher)  # the control is cut from the original
        return self.random_model(self.args.teacher_layers, self.args.teacher_width)

    def initial_control(self, teacher: PreTrainedModel) -> PreTrainedModel:
        return self.untrained_student(self.pretrained_teacher)

    def initial_student(self, teacher: PreTrainedModel) -> PreTrainedModel:
        student = self.untrained_student(teacher)
        disable_dropout(student)
        return student

    def untrained_student(self, source: PreTrainedModel | None) -> PreTrainedModel:
        """The student before training. A cut has layers of `source`, or random weights if `source` is None."""
        args = self.args
        if self.pretrained_student is not None:
            return copy.deepcopy(self.pretrained_student)
        if args.student == CUT and source is not None:
            return self.cut(source)
        return self.random_model(
            args.student_layers, args.teacher_width if args.student == CUT else args.student_width
        )

    def cut(self, source: PreTrainedModel) -> PreTrainedModel:
        """A student with layers of `source`."""
        student = cut_layers(source, self.args.student_layers)
        student.generation_config = copy.deepcopy(source.generation_config)
        return student

    def random_model(self, layers: int, width: int) -> PreTrainedModel:
        args, end = self.args, self.tokenizer.eos_token_id
        return random_gpt2(self.vocabulary, end, layers, width, args.block_size, args.dropout)

    @property
    def vocabulary(self) -> int:
        """Number of logits of models with random weights."""
        pretrained = self.pretrained_teacher
        return len(self.tokenizer) if pretrained is None else int(pretrained.config.vocab_size)

    # ---- training ----

    @property
    def common_arguments(self) -> dict[str, Any]:
        return {"train_sampling_strategy": "random"}  # all blocks have the same length

    def learning_rate(self, training: KDTrainingArguments, role: str) -> float:
        """--from_scratch_learning_rate for random weights, otherwise --learning_rate."""
        if role == "teacher" or self.args.student == CUT:
            from_scratch = self.pretrained_teacher is None
        else:
            from_scratch = self.args.student == SCRATCH
        return float(self.args.from_scratch_learning_rate if from_scratch else training.learning_rate)

    def method(self, training: KDTrainingArguments, model: PreTrainedModel, teacher: PreTrainedModel | None) -> Method:
        method = super().method(training, model, teacher)
        if teacher is not None and self.args.hidden_weight:
            method += hidden_states(model, teacher, self.args.hidden_weight)
        return method

    def collator(self, model: PreTrainedModel) -> Callable[[Any], dict[str, Any]]:
        return stack

    def token_metrics(self, counts: np.ndarray) -> dict[str, float]:
        return language_metrics(counts, self.size("validation"))

    # ---- evaluation and report ----

    def evaluate(
        self, run: TrainerRun, role: str, model: PreTrainedModel, teacher: LanguageEvaluation | None = None
    ) -> LanguageEvaluation:
        """Evaluates a model on every split but train. With the evaluation of the `teacher`, this includes the share of
        labels for which both predict the same token. Warns if the teacher is no better than chance.
        """
        entry, counts, choices = self.measured(self._name(role, model), model, run.args.per_device_eval_batch_size)
        if teacher is not None:
            for split, metrics in entry["metrics"].items():
                metrics["agreement"] = float((choices[split] == teacher.choices[split]).mean())
        if role == "teacher":
            self.warn_if_at_chance(run, entry, model.config.vocab_size)
        return LanguageEvaluation(entry, choices, self.measure(counts["validation"], choices["validation"]))

    def measured(
        self, name: str, model: PreTrainedModel, batch_size: int
    ) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, np.ndarray]]:
        """A model's entry in results.json, its `token_counts` (rows, 3), and its most probable tokens (labels,), of
        every split but train. Latency and FLOPs are those of a row of validation or, if there is none, of the first
        split.
        """
        splits = {split: rows for split, rows in self.splits.items() if split != "train"}
        collate, metrics, choices, counts = self.collator(model), {}, {}, {}
        for split, rows in splits.items():
            counts[split], choices[split] = predict_tokens(model, rows, collate, batch_size)
            metrics[split] = self.split_metrics(split, counts[split])
        row = collate([splits.get("validation", next(iter(splits.values())))[0]])
        inputs = {name: value.to(model.device) for name, value in row.items() if name not in NOT_INPUTS}
        return {"name": name, **cost(model, inputs), "metrics": metrics}, counts, choices

    def split_metrics(self, split: str, counts: np.ndarray) -> dict[str, float]:
        """The metrics of `token_counts` (rows, 3) of a split."""
        return language_metrics(counts, self.size(split))

    def measure(self, counts: np.ndarray, choices: np.ndarray) -> Measurement:
        """The measurement of the primary metric from the validation split's counts and most probable tokens."""
        return measure_perplexity(counts, choices)

    def measurements(self, evaluations: dict[str, LanguageEvaluation]) -> dict[str, Measurement]:
        """Those whose examples are the same, by role."""
        return {role: evaluation.measurement for role, evaluation in evaluations.items()}

    def _name(self, role: str, model: PreTrainedModel) -> str:
        if role == "teacher" and self.pretrained_teacher is not None:
            return str(self.args.teacher)
        shape = f"{model.config.model_type} {model.config.num_hidden_layers}x{width(model)}"
        return f"{shape}, labels only" if role == "control" else shape

    def report(
        self, run: TrainerRun, evaluations: dict[str, LanguageEvaluation], models: dict[str, PreTrainedModel]
    ) -> None:
        """Writes the results, a text that each model generates, and the student's folder.

        `evaluations` and `models` by role: teacher, control (unless --no_control) and student.
        """
        sample = self.sample()
        samples = {role: self.continued(role, model, sample) for role, model in models.items()}
        tokens = {split: len(label_tokens(rows)) for split, rows in self.splits.items()}
        results = self.results(
            run,
            self.data.name,
            {role: evaluation.entry for role, evaluation in evaluations.items()},
            measurements=self.measurements(evaluations),
            method=self.method_name + ("_hidden" if self.args.hidden_weight else ""),
            corpus={"tokens": tokens, "bytes": {split: self.size(split) for split in self.splits}},
            sample={"prompt": one_line(sample.prompt)} | samples,
            **self.headline(models["student"].config.vocab_size),
        )
        run.finish(
            results, models["student"], card_of(run, self.usage(sample), "text-generation", KNOWN), self.tokenizer
        )

    def size(self, split: str) -> int:
        """Size of a split's text in UTF-8 bytes."""
        return int(self.data.size(split))

    def headline(self, vocabulary: int) -> dict[str, Any]:
        """The primary metric, and its value for a model that predicts the frequencies of the tokens."""
        train, validation = (label_tokens(self.splits[split]) for split in ("train", "validation"))
        chance = unigram_perplexity(train, validation, vocabulary)
        return {"metric": "perplexity", "lower_is_better": True, "chance": chance}

    def sample(self) -> Sample:
        """The prompt of the texts in the report."""
        prompt = first_words(self.data, self.tokenizer, self.args.block_size)
        new = min(CONTINUATION, self.args.block_size // 2)  # the prompt must fit into the context too
        return Sample(prompt, self.tokenizer(prompt)["input_ids"], new)

    def continued(self, role: str, model: PreTrainedModel, sample: Sample) -> str:
        """The text that the model of a role generates after the prompt."""
        return continuation(model, self.tokenizer, sample)

    def usage(self, sample: Sample) -> str:
        """The code of the model card."""
        return USAGE.format(prompt=json.dumps(sample.prompt, ensure_ascii=False), new=sample.new)


def predict_tokens(
    model: PreTrainedModel, rows: Dataset, collate: Collate, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """`token_counts` (rows, 3), and the most probable token of each label (labels,).

    Always in fp32, the precision of a model that a user loads.
    """

    def with_targets(rows: Any) -> dict[str, Tensor]:
        batch = collate(rows)
        return batch | {"targets": batch["labels"]}  # labels are not passed to models

    def call(targets: Tensor, **inputs: Tensor) -> dict[str, Any]:
        logits = model(**inputs).logits
        choices = zip(logits.argmax(-1), targets, strict=True)
        return {
            "counts": token_counts(logits, targets),
            "choices": [chosen[labels != IGNORED] for chosen, labels in choices],
        }

    outputs = run_inference(model, call, rows, with_targets, batch_size=batch_size, description="evaluating")
    return torch.stack(outputs["counts"]).numpy(), torch.cat(outputs["choices"]).numpy()


def first_words(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, block_size: int) -> str:
    """The first words of a document (or line) of the test split or, if there is none, of the validation split."""
    documents = corpus.splits.get("test", corpus.splits["validation"])
    document = next((text for text in documents if len(text.split()) >= PROMPT), documents[0])
    ids = tokenizer(document, add_special_tokens=False, truncation=True, max_length=min(PROMPT, block_size // 2))
    return str(tokenizer.decode(ids["input_ids"])).rsplit(maxsplit=1)[0]  # the last word may be incomplete


def continuation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sample: Sample) -> str:
    """The text that a model generates after the prompt, greedily, as one line."""
    ids = torch.tensor([sample.ids], device=model.device)
    generated = model.eval().generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=sample.new,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    return one_line(str(tokenizer.decode(generated[0, ids.shape[1] :])))


def one_line(text: str) -> str:
    return " ".join(text.split())
