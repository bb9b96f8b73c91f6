"""Distillation of an encoder-decoder translator: teacher, its translations, control, student, evaluation and report.

Word-level: the teacher's distribution over each next token; sequence-level: the teacher's translations as targets
(Kim and Rush, "Sequence-Level Knowledge Distillation", arXiv:1606.07947).
"""

import copy
import json
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel, PreTrainedTokenizerBase

from kd.common.data.fingerprints import dataset_hash, outputs_key
from kd.common.metrics.quality import token_metrics
from kd.common.pretrained import stage_loader
from kd.common.reporting.plots import plot_curves
from kd.common.training.run import TrainerRun
from kd.common.training.teacher_outputs import cache_outputs
from kd.common.utils.errors import UserError
from kd.nlp.data.loading import Collator
from kd.nlp.data.translation import TranslationCollator, TranslationData, tokenize_translation
from kd.nlp.student_model.layers import cut_translator, number_of_layers
from kd.nlp.student_model.sequence_distillation import (
    CUT,
    Splits,
    check_same_vocabulary,
    divergence_of,
    learn_tokenizer,
    sequence_results,
    token_level,
    train_on_tokens,
    warn_of_guessing,
)
from kd.nlp.student_model.sequence_evaluation import Translated, evaluate_translator
from kd.nlp.teacher_model.generative import (
    SCRATCH,
    Generator,
    beam_search,
    joint_bpe,
    load_translator,
    random_marian,
    special_ids_of,
)

USAGE = """from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}")
model = AutoModelForSeq2SeqLM.from_pretrained("{folder}").eval()
ids = model.generate(**tokenizer({sentence}, return_tensors="pt"))  # greedy, unless num_beams is more than 1
print(tokenizer.decode(ids[0], skip_special_tokens=True))"""
read_model = stage_loader(AutoModelForSeq2SeqLM)


def load_named_models(args: Any) -> tuple[Generator | None, Generator | None]:
    """Teacher and student of --teacher and --student, None where these are not names.

    Raises UserError where they cannot be distilled as `args` (those of scripts/distill_translation.py) ask.
    """
    teacher = None if args.teacher == SCRATCH else load_translator(args.teacher, args.max_length)
    student = None if args.student in (SCRATCH, CUT) else load_translator(args.student, args.max_length)
    if args.student == CUT:
        layers = number_of_layers(teacher.model) if teacher else (args.teacher_layers, args.teacher_layers)
        for side, kept, number in zip(("encoder", "decoder"), student_layers(args), layers, strict=True):
            if kept > number:
                raise UserError(f"--student_{side}_layers {kept} cannot be cut from the teacher's {number}")
    check_same_vocabulary(args, student, teacher)
    return teacher, student


@dataclass(frozen=True)
class TranslationTask:
    """What all models of a run share. `args` are those of scripts/distill_translation.py."""

    args: Any
    data: TranslationData
    tokenizer: PreTrainedTokenizerBase
    splits: Splits
    pretrained_teacher: PreTrainedModel | None
    pretrained_student: PreTrainedModel | None


def translation_task(
    run: TrainerRun, args: Any, data: TranslationData, teacher: Generator | None, student: Generator | None
) -> TranslationTask:
    """The data in the teacher's tokens, or in those of a vocabulary that is learned for a teacher from scratch."""

    def learn() -> PreTrainedTokenizerBase:
        train = data.splits["train"]
        return joint_bpe([*train["source"], *train["target"]], args.vocabulary_size, args.max_length)

    tokenizer = teacher.tokenizer if teacher else learn_tokenizer(run, learn)
    splits = tokenize_translation(data, tokenizer, args.source_prefix)
    return TranslationTask(args, data, tokenizer, splits, teacher and teacher.model, student and student.model)


# ---- models ----


def train_teacher(run: TrainerRun, task: TranslationTask) -> PreTrainedModel:
    """Trained on the data, from random or pretrained weights; a pretrained one without epochs stays as it is."""
    args = task.args
    if task.pretrained_teacher is not None and args.teacher_epochs == 0:
        return task.pretrained_teacher

    def build() -> PreTrainedModel:
        rate = args.teacher_learning_rate or run.args.learning_rate
        settings = {"num_train_epochs": args.teacher_epochs, "learning_rate": rate}
        return _train(run, task, "teacher", initial_teacher(task), task.splits["train"], **settings)

    return run.stage("teacher", build, read_model, task.tokenizer)


def train_control(run: TrainerRun, task: TranslationTask, teacher: PreTrainedModel) -> PreTrainedModel:
    """The student without a teacher: the same start, but for a cut, which is made from the teacher before it was
    trained; as many updates, labels only.
    """

    def build() -> PreTrainedModel:
        source = initial_teacher(task) if task.args.student == CUT else teacher
        return _train(run, task, "control", initial_student(task, source), task.splits["train"])

    return run.stage("control", build, read_model, task.tokenizer)


def train_student(
    run: TrainerRun, task: TranslationTask, teacher: PreTrainedModel, translations: Dataset | None
) -> PreTrainedModel:
    """Trained on the teacher's distributions (word), on its `translations` (sequence), or on both."""

    def build() -> PreTrainedModel:
        train = task.splits["train"] if translations is None else translations
        word_level = None if task.args.method == "sequence" else teacher
        return _train(run, task, "student", initial_student(task, teacher), train, word_level)

    return run.stage("student", build, read_model, task.tokenizer)


def initial_teacher(task: TranslationTask) -> PreTrainedModel:
    """The teacher before it is trained here."""
    args, tokenizer = task.args, task.tokenizer
    if task.pretrained_teacher is not None:
        return copy.deepcopy(task.pretrained_teacher)
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "eos_token_id")}
    ids["decoder_start_token_id"] = ids["pad_token_id"]
    layers = args.teacher_layers
    return random_marian(len(tokenizer), ids, args.teacher_width, layers, layers, args.dropout, args.max_length)


def initial_student(task: TranslationTask, source: PreTrainedModel) -> PreTrainedModel:
    """A student before it is trained; a cut is made from `source`."""
    args = task.args
    if task.pretrained_student is not None:
        return copy.deepcopy(task.pretrained_student)
    if args.student == CUT:
        return cut_translator(source, *student_layers(args))
    vocabulary, ids = source.config.vocab_size, special_ids_of(source)
    return random_marian(vocabulary, ids, args.student_width, *student_layers(args), args.dropout, args.max_length)


def student_layers(args: Any) -> tuple[int, int]:
    return args.student_encoder_layers, args.student_decoder_layers


def _train(
    run: TrainerRun,
    task: TranslationTask,
    name: str,
    model: PreTrainedModel,
    train: Dataset,
    teacher: PreTrainedModel | None = None,
    **settings: Any,
) -> PreTrainedModel:
    """On the labels of `train`, and with a teacher on its distributions over them too."""
    args = run.args
    alpha = 1.0 if teacher is None else args.alpha
    method = token_level(alpha, divergence_of("forward", args.temperature), args.label_smoothing_factor)
    collate = TranslationCollator(task.tokenizer, model)
    validation = task.splits["validation"]
    return train_on_tokens(run, name, model, method, train, validation, collate, token_metrics, teacher, **settings)


# ---- the teacher's translations ----


def translate_training_set(run: TrainerRun, task: TranslationTask, teacher: PreTrainedModel) -> Dataset:
    """The training split with the teacher's translations as labels, computed once and cached by sample id."""
    rows, beams, precision = task.splits["train"], task.args.beams, run.args.precision
    sources = rows.select_columns(["sample_id", "input_ids", "attention_mask", "length"])
    key = outputs_key(teacher, dataset_hash(sources), beams, task.args.max_length, precision)
    call, collate, folder = beam_search(teacher, beams), Collator(task.tokenizer), run.folder / "teacher_outputs"
    with run.timed("teacher_outputs"):
        translations = cache_outputs(teacher, call, sources, collate, folder, key, precision)

    def relabel(batch: dict[str, list]) -> dict[str, list]:
        labels = translations.feature("tokens", torch.tensor(batch["sample_id"]))
        lengths = [len(source) + len(target) for source, target in zip(batch["input_ids"], labels, strict=True)]
        return {"labels": [tokens.tolist() for tokens in labels], "length": lengths}

    return rows.map(relabel, batched=True, load_from_cache_file=False, new_fingerprint=key)


# ---- evaluation and report ----


def evaluate(run: TrainerRun, task: TranslationTask, role: str, model: PreTrainedModel) -> Translated:
    """See `evaluate_translator`. Warns of a teacher that is no better than chance."""
    translator = Generator(model, task.tokenizer)
    found = evaluate_translator(_name(task, role, model), translator, task.data, task.splits, task.args.beams)
    if role == "teacher":
        warn_of_guessing(run, found[0], task.splits, model.config.vocab_size)
    return found


def _name(task: TranslationTask, role: str, model: PreTrainedModel) -> str:
    if role == "teacher" and task.pretrained_teacher is not None:
        return str(task.args.teacher)
    layers = "+".join(map(str, number_of_layers(model)))
    return f"{model.config.model_type} of {layers} layers, width {model.config.hidden_size}"


def report(
    run: TrainerRun, task: TranslationTask, evaluations: dict[str, Translated], student: PreTrainedModel
) -> None:
    """Writes the results and the student's folder. `evaluations` by role: teacher, control (if any), student."""
    results = sequence_results(
        run,
        f"{task.data.name} {'-'.join(task.data.languages)}",
        task.data,
        task.splits,
        {role: entry for role, (entry, _, _) in evaluations.items()},
        method=task.args.method,
        metric="bleu",  # greedy: a student is made to be fast, and that is the fast way to decode
        decoding={role: seconds for role, (_, seconds, _) in evaluations.items()},
        sacrebleu=evaluations["student"][2],
    )
    example = task.args.source_prefix + task.data.splits["validation"]["source"][0]
    usage = USAGE.format(folder=run.folder / "student", sentence=json.dumps(example, ensure_ascii=False))
    card = {"library_name": "transformers", "pipeline_tag": "translation"}
    run.finish(results, student, usage, task.tokenizer, **card)
    if PartialState().is_main_process:  # instead of a curve of BLEU, which is only measured at the end
        curve = results | {"primary_metric": {"split": "validation", "name": "token_accuracy"}}
        plot_curves(run.folder / "curves.png", run.history, curve)
