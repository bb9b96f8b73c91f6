"""Task-agnostic distillation of a masked language model, as DistilBERT was made: models, training and report."""

import json
import math
from collections.abc import Callable
from functools import cached_property
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase

from kd.common.data.sources import print_notes
from kd.common.losses import feature_cosine
from kd.common.methods import Method, match
from kd.common.metrics.quality import chance_warning, token_metrics
from kd.common.metrics.verdict import Measurement, measure_token_accuracy
from kd.common.token_terms import TokenTerm, all_tokens, divergence_term, label_term, per_token
from kd.common.training.arguments import KDTrainingArguments
from kd.common.training.inference import column_array
from kd.common.training.trainer_run import TrainerRun
from kd.common.utils.errors import UserError
from kd.nlp.data.corpora import KNOWN, Corpus
from kd.nlp.data.masking import MaskedRows, Masking, check_tokenizer, fixed_masks, token_rows
from kd.nlp.student_model.arguments import CUT
from kd.nlp.student_model.cards import card_of
from kd.nlp.student_model.generation import Splits, check_same_vocabulary, label_tokens
from kd.nlp.student_model.language_model import LanguageEvaluation, LanguageTask, one_line
from kd.nlp.student_model.layers import alternating_layers, cut_layers, kept_layers
from kd.nlp.student_model.methods import regressor_of, text_features
from kd.nlp.student_model.token_objective import divergence_of
from kd.nlp.teacher_model import SCRATCH
from kd.nlp.teacher_model.generative import Generator
from kd.nlp.teacher_model.masked import load_masked_language_model, random_bert, word_pieces

LONG = 0.1  # share of full rows above which a note says that texts are truncated
METRIC = "masked_accuracy"
SAMPLE = 24  # maximum number of tokens of the sample in the report
USAGE = """from transformers import pipeline

folder = "student"  # the path of this model, or its name on the Hub
fill_mask = pipeline("fill-mask", model=folder)
for guess in fill_mask({text}):
    print(guess["token_str"], guess["score"])"""


def load_named_models(args: Any) -> tuple[Generator | None, Generator | None]:
    """The models of --teacher and --student; None for `scratch` and `cut`. `args` are those of distill_mlm.py. Sets
    the default of --student_layers, half of the teacher's layers.

    Raises UserError if this student cannot be distilled from this teacher.
    """
    named = {"--teacher": args.teacher, "--student": args.student}
    teacher, student = (
        None if name in (SCRATCH, CUT) else load_masked_language_model(name, args.block_size, flag)
        for flag, name in named.items()
    )
    check_same_vocabulary(args, student, teacher)
    for name, model in zip(named.values(), (teacher, student), strict=True):
        if model is not None:
            check_tokenizer(name, model.tokenizer, args.whole_words)
    layers = teacher.model.config.num_hidden_layers if teacher else args.teacher_layers
    args.student_layers = args.student_layers or max(1, layers // 2)
    if args.student == CUT and args.student_layers > layers:
        raise UserError(f"--student_layers {args.student_layers} cannot be cut from the teacher's {layers}")
    if args.student == CUT and teacher:
        kept_layers(teacher.model, args.student_layers)  # raises UserError for layers of different shapes
    return teacher, student


class MaskedLanguageTask(LanguageTask):
    """The distillation of a masked language model. `data` is a Corpus. The train split is unmasked, because its masks
    differ between epochs; those of the other splits are fixed.
    """

    auto_class = AutoModelForMaskedLM

    @staticmethod
    def learn_tokenizer(args: Any, data: Corpus) -> PreTrainedTokenizerBase:
        return word_pieces(data.splits["train"], args.vocabulary_size, args.block_size)

    @staticmethod
    def tokenize(args: Any, data: Corpus, tokenizer: PreTrainedTokenizerBase) -> Splits:
        masking = masking_of(args, tokenizer)
        splits = {}
        for split, texts in data.splits.items():
            rows = token_rows(texts, tokenizer, args.block_size, args.pack, args.whole_words)
            full = int((column_array(rows, "length") == args.block_size).sum())
            if not args.pack and full > LONG * len(rows):
                data.notes.append(f"{full:,} of {len(rows):,} rows of {split} are full; --pack keeps all tokens")
                print_notes(data.name, data.notes[-1:])
            splits[split] = rows if split == "train" else fixed_masks(rows, masking)
            if split != "train" and not len(label_tokens(splits[split])):
                raise UserError(f"no token of the {split} split is masked: add texts, or pass a larger --mask_share")
        return splits

    @cached_property
    def masking(self) -> Masking:
        return masking_of(self.args, self.tokenizer)

    # ---- models ----

    def initial_control(self, teacher: PreTrainedModel) -> PreTrainedModel:
        return self.untrained_student(teacher)  # the control differs from the student in its loss alone

    def initial_student(self, teacher: PreTrainedModel) -> PreTrainedModel:
        return self.untrained_student(teacher)

    def cut(self, source: PreTrainedModel) -> PreTrainedModel:
        kept = alternating_layers(self.args.student_layers, source.config.num_hidden_layers)
        return cut_layers(source, len(kept), kept)

    def random_model(self, layers: int, width: int) -> PreTrainedModel:
        args, pretrained = self.args, self.pretrained_teacher
        vocabulary = len(self.tokenizer) if pretrained is None else pretrained.config.vocab_size
        padding = self.tokenizer.pad_token_id
        return random_bert(vocabulary, padding, layers, width, args.block_size, args.dropout)

    # ---- training ----

    @property
    def common_arguments(self) -> dict[str, Any]:
        return {"train_sampling_strategy": "random" if self.args.pack else "group_by_length"}

    def training_rows(self, run: TrainerRun, rows: Dataset) -> MaskedRows:
        """Rows that are masked anew in each epoch. The masks of control and student are the same."""
        return MaskedRows(rows, self.masking, run.args.seed)

    def method(self, training: KDTrainingArguments, model: PreTrainedModel, teacher: PreTrainedModel | None) -> Method:
        """The loss of DistilBERT's distiller.py, or the masked tokens alone without a teacher. With gradient
        accumulation, a micro-batch counts in all terms by its number of masked tokens.
        """
        labels, args = label_term(training.label_smoothing_factor), self.args
        if teacher is None:
            return Method({"task": (1.0, labels)})
        soft_targets = token_soft_targets(training.temperature, args.soft_target_positions)
        method = Method({"task": (args.alpha_mlm, labels), "soft_targets": (args.alpha_ce, soft_targets)})
        if not args.alpha_cos:
            return method
        last, teacher_last = text_features(model).last, text_features(teacher).last
        regressor = regressor_of(model, teacher)
        return method + match("cosine", args.alpha_cos, last, teacher_last, feature_cosine, regressor)

    def collator(self, model: PreTrainedModel) -> Callable[[Any], dict[str, Any]]:
        return self.masking.collate

    def token_metrics(self, counts: np.ndarray) -> dict[str, float]:
        return masked_metrics(counts)

    # ---- evaluation and report ----

    def split_metrics(self, split: str, counts: np.ndarray) -> dict[str, float]:
        return masked_metrics(counts)

    def measure(self, counts: np.ndarray, choices: np.ndarray) -> Measurement:
        return measure_token_accuracy(counts, choices)

    @cached_property
    def chance(self) -> float:
        """The masked accuracy on validation of the most frequent token of train."""
        ids = torch.from_numpy(np.concatenate(self.splits["train"].with_format("numpy")[:]["input_ids"]))
        counts = torch.bincount(ids[~torch.isin(ids, self.masking.special)])
        return float((label_tokens(self.splits["validation"]) == counts.argmax().item()).mean())

    def warn_if_at_chance(self, run: TrainerRun, entry: dict[str, Any], vocabulary: int) -> None:
        number, value = len(label_tokens(self.splits["validation"])), entry["metrics"]["validation"][METRIC]
        error = math.sqrt(self.chance * (1 - self.chance) / number)
        name = f"validation {METRIC}"
        run.warn(chance_warning(entry["name"], name, value, self.chance, "the most frequent token", error))

    def report(
        self, run: TrainerRun, evaluations: dict[str, LanguageEvaluation], models: dict[str, PreTrainedModel]
    ) -> None:
        """Writes the results, the guesses of each model for a masked token, and the student's folder.

        `evaluations` and `models` by role: teacher, control (unless --no_control) and student.
        """
        text, token = masked_sentence(self.data, self.tokenizer, min(SAMPLE, self.args.block_size // 2))
        guesses = {role: ", ".join(guess(model, self.tokenizer, text)) for role, model in models.items()}
        tokens = {split: int(sum(rows["length"][:])) for split, rows in self.splits.items()}
        masked = {s: len(label_tokens(rows)) for s, rows in self.splits.items() if s != "train"}
        results = self.results(
            run,
            self.data.name,
            {role: evaluation.entry for role, evaluation in evaluations.items()},
            measurements={role: evaluation.measurement for role, evaluation in evaluations.items()},
            method="mlm",
            metric=METRIC,
            floor=self.chance,
            chance=self.chance,
            corpus={"tokens": tokens, "masked": masked, "bytes": {s: self.data.size(s) for s in self.splits}},
            sample={"text": text, "masked token": token} | guesses,
        )
        card = card_of(run, USAGE.format(text=json.dumps(text, ensure_ascii=False)), "fill-mask", KNOWN)
        run.finish(results, models["student"], card, self.tokenizer)


def masking_of(args: Any, tokenizer: PreTrainedTokenizerBase) -> Masking:
    return Masking(tokenizer, args.mask_share, args.whole_words)


def token_soft_targets(temperature: float, positions: Literal["all", "masked"]) -> TokenTerm:
    """T^2 KL(teacher || student) of the distributions over the vocabulary, averaged over all tokens that are not
    padding, as in DistilBERT's distiller.py, or over the masked ones alone (its --restrict_ce_to_mask).
    """
    return divergence_term(divergence_of("kd", temperature), per_token if positions == "masked" else all_tokens)


def masked_metrics(counts: np.ndarray) -> dict[str, float]:
    """Returns masked_accuracy and masked_perplexity from `token_counts` (rows, 3)."""
    metrics = token_metrics(counts)
    return {METRIC: metrics["token_accuracy"], "masked_perplexity": metrics["perplexity"]}


def masked_sentence(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, most: int) -> tuple[str, str]:
    """The first tokens, at most `most`, of a document (or line) of the test split or, if there is none, of the
    validation split, with a mask token in the middle, and the token at that place.
    """
    documents = corpus.splits.get("test", corpus.splits["validation"])
    encodings = (tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:most] for text in documents)
    ids = max(islice(encodings, 100), key=len)
    middle = len(ids) // 2
    token, ids[middle] = str(tokenizer.decode([ids[middle]])).strip(), tokenizer.mask_token_id
    return one_line(str(tokenizer.decode(ids))), token


def guess(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, number: int = 3) -> list[str]:
    """The most probable tokens at the mask token of a text."""
    inputs = tokenizer(text, return_tensors="pt").to(model.device)
    with torch.no_grad():
        logits = model.eval()(inputs["input_ids"], inputs["attention_mask"]).logits
    at_mask = logits[0, (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero()[0, 0]]
    return [str(tokenizer.decode([token])).strip() for token in at_mask.topk(number).indices.tolist()]
