"""Distillation of a causal language model: teacher, control, student, evaluation and report."""

import copy
import json
from dataclasses import dataclass
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from kd.common.methods import Method
from kd.common.metrics.quality import language_metrics
from kd.common.pretrained import stage_loader
from kd.common.training.run import TrainerRun
from kd.common.utils.errors import UserError
from kd.nlp.data.corpora import Corpus, pack, stack
from kd.nlp.student_model.layers import check_cut, cut_layers, layer_paths
from kd.nlp.student_model.methods import hidden_states, layer_pairs, width
from kd.nlp.student_model.sequence_distillation import (
    CUT,
    Splits,
    check_same_vocabulary,
    divergence_of,
    label_tokens,
    learn_tokenizer,
    sequence_results,
    token_level,
    train_on_tokens,
    warn_of_guessing,
)
from kd.nlp.student_model.sequence_evaluation import (
    CONTINUATION,
    Choices,
    continuation,
    evaluate_language_model,
    first_words,
    one_line,
)
from kd.nlp.student_model.training import switch_off_dropout
from kd.nlp.teacher_model.generative import SCRATCH, Generator, byte_level_bpe, load_language_model, random_gpt2

METHODS = {"forward": "forward_kl", "reverse": "reverse_kl", "js": "jensen_shannon"}
USAGE = """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}")
model = AutoModelForCausalLM.from_pretrained("{folder}").eval()
ids = model.generate(**tokenizer({prompt}, return_tensors="pt"), max_new_tokens={new}, do_sample=False)
print(tokenizer.decode(ids[0]))"""
read_model = stage_loader(AutoModelForCausalLM)


def load_named_models(args: Any) -> tuple[Generator | None, Generator | None]:
    """Teacher and student of --teacher and --student, None where these are not names.

    Raises UserError where they cannot be distilled as `args` (those of scripts/distill_gpt.py) ask.
    """
    teacher = None if args.teacher == SCRATCH else load_language_model(args.teacher, args.block_size)
    student = None if args.student in (SCRATCH, CUT) else load_language_model(args.student, args.block_size)
    check_same_vocabulary(args, student, teacher)
    layers = len(layer_paths(teacher.model)) if teacher else args.teacher_layers
    if args.student == CUT and args.student_layers > layers:
        raise UserError(f"--student_layers {args.student_layers} cannot be cut from the teacher's {layers}")
    if args.student == CUT and teacher:
        check_cut(teacher.model, args.student_layers)
    if args.hidden_weight:
        layer_pairs("uniform", len(layer_paths(student.model)) if student else args.student_layers, layers)
    return teacher, student


@dataclass(frozen=True)
class LanguageTask:
    """What all models of a run share. `args` are those of scripts/distill_gpt.py."""

    args: Any
    corpus: Corpus
    tokenizer: PreTrainedTokenizerBase
    blocks: Splits
    pretrained_teacher: PreTrainedModel | None
    pretrained_student: PreTrainedModel | None


def language_task(
    run: TrainerRun, args: Any, corpus: Corpus, teacher: Generator | None, student: Generator | None
) -> LanguageTask:
    """The corpus in blocks of the teacher's tokens, or of a vocabulary that is learned for a teacher from scratch."""
    tokenizer = (
        teacher.tokenizer
        if teacher
        else learn_tokenizer(
            run, lambda: byte_level_bpe(corpus.splits["train"], args.vocabulary_size, args.block_size)
        )
    )
    blocks = {split: pack(texts, tokenizer, args.block_size) for split, texts in corpus.splits.items()}
    return LanguageTask(args, corpus, tokenizer, blocks, teacher and teacher.model, student and student.model)


# ---- models ----


def train_teacher(run: TrainerRun, task: LanguageTask) -> PreTrainedModel:
    """Trained on the corpus, from random or pretrained weights; a pretrained one without epochs stays as it is."""
    args, pretrained = task.args, task.pretrained_teacher
    if pretrained is not None and args.teacher_epochs == 0:
        return pretrained

    def build() -> PreTrainedModel:
        if pretrained is not None:
            model, rate = copy.deepcopy(pretrained), run.args.learning_rate  # the control is cut from the original
        else:
            model, rate = random_model(task, args.teacher_layers, args.teacher_width), args.from_scratch_learning_rate
        return _train(run, task, "teacher", model, rate, num_train_epochs=args.teacher_epochs)

    return run.stage("teacher", build, read_model, task.tokenizer)


def train_control(run: TrainerRun, task: LanguageTask) -> PreTrainedModel:
    """The student without a teacher: cut from the pretrained model (or random, or named, as the student is), as many
    updates, labels only.
    """

    def build() -> PreTrainedModel:
        return _train(run, task, "control", initial_student(task, task.pretrained_teacher), student_rate(run, task))

    return run.stage("control", build, read_model, task.tokenizer)


def train_student(run: TrainerRun, task: LanguageTask, teacher: PreTrainedModel) -> PreTrainedModel:
    """Cut from the trained teacher (or random, or named) and trained on its distributions over next tokens."""

    def build() -> PreTrainedModel:
        return _train(run, task, "student", initial_student(task, teacher), student_rate(run, task), teacher)

    return run.stage("student", build, read_model, task.tokenizer)


def initial_student(task: LanguageTask, source: PreTrainedModel | None) -> PreTrainedModel:
    """A student before it is trained; a cut is made from `source`, or has random weights where that is None."""
    args = task.args
    if task.pretrained_student is not None:
        return copy.deepcopy(task.pretrained_student)
    if args.student == CUT and source is not None:
        student = cut_layers(source, args.student_layers)
        student.generation_config = copy.deepcopy(source.generation_config)
        return student
    return random_model(task, args.student_layers, args.teacher_width if args.student == CUT else args.student_width)


def random_model(task: LanguageTask, layers: int, width: int) -> PreTrainedModel:
    args, pretrained = task.args, task.pretrained_teacher
    vocabulary = len(task.tokenizer) if pretrained is None else pretrained.config.vocab_size
    return random_gpt2(vocabulary, task.tokenizer.eos_token_id, layers, width, args.block_size, args.dropout)


def student_rate(run: TrainerRun, task: LanguageTask) -> float:
    args = task.args
    from_scratch = args.student == SCRATCH or (args.student == CUT and task.pretrained_teacher is None)
    return float(args.from_scratch_learning_rate if from_scratch else run.args.learning_rate)


def _train(
    run: TrainerRun,
    task: LanguageTask,
    name: str,
    model: PreTrainedModel,
    rate: float,
    teacher: PreTrainedModel | None = None,
    **settings: Any,
) -> PreTrainedModel:
    """On the tokens of train, and with a teacher (then without dropout) on its distributions over them too."""
    args, training, size = task.args, run.args, task.corpus.size("validation")
    alpha = 1.0 if teacher is None else training.alpha
    divergence = divergence_of(args.divergence, training.temperature, args.js_beta)
    method = token_level(alpha, divergence, training.label_smoothing_factor)
    if teacher is not None:
        switch_off_dropout(model)
        method += hidden_states(model, teacher, args.hidden_weight) if args.hidden_weight else Method({})
    settings = {"learning_rate": rate, "train_sampling_strategy": "random"} | settings
    train, validation = task.blocks["train"], task.blocks["validation"]
    return train_on_tokens(
        run,
        name,
        model,
        method,
        train,
        validation,
        stack,
        lambda counts: language_metrics(counts, size),
        teacher,
        **settings,
    )


# ---- evaluation and report ----


def evaluate(
    run: TrainerRun, task: LanguageTask, role: str, model: PreTrainedModel, teacher_choices: Choices | None = None
) -> tuple[dict[str, Any], Choices]:
    """See `evaluate_language_model`. Warns of a teacher that is no better than chance."""
    batch_size = run.args.per_device_eval_batch_size
    entry, choices = evaluate_language_model(
        _name(task, role, model), model, task.corpus, task.blocks, batch_size, teacher_choices
    )
    if role == "teacher":
        warn_of_guessing(run, entry, task.blocks, model.config.vocab_size)
    return entry, choices


def _name(task: LanguageTask, role: str, model: PreTrainedModel) -> str:
    if role == "teacher" and task.pretrained_teacher is not None:
        return str(task.args.teacher)
    shape = f"{model.config.model_type} {len(layer_paths(model))}x{width(model)}"
    return f"{shape}, labels only" if role == "control" else shape


def report(
    run: TrainerRun, task: LanguageTask, entries: dict[str, dict[str, Any]], models: dict[str, PreTrainedModel]
) -> None:
    """Writes results, a sample of what each model generates, and the student's folder. `entries` and `models` by
    role: teacher, control (where there is one), student.
    """
    args, new = task.args, min(CONTINUATION, task.args.block_size // 2)  # the prompt must stay in sight
    prompt = first_words(task.corpus, task.tokenizer, args.block_size)
    samples = {role: continuation(model, task.tokenizer, prompt, new) for role, model in models.items()}
    tokens = {split: len(label_tokens(blocks)) for split, blocks in task.blocks.items()}
    results = sequence_results(
        run,
        task.corpus.name,
        task.corpus,
        task.blocks,
        entries,
        method=METHODS[args.divergence] + ("_hidden" if args.hidden_weight else ""),
        metric="perplexity",
        lower_is_better=True,
        corpus={"tokens": tokens, "bytes": {split: task.corpus.size(split) for split in task.blocks}},
        sample={"prompt": one_line(prompt)} | samples,
    )
    quoted = json.dumps(prompt, ensure_ascii=False)
    usage = USAGE.format(folder=run.folder / "student", prompt=quoted, new=new)
    card = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    run.finish(results, models["student"], usage, task.tokenizer, **card)
