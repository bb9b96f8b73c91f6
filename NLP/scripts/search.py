"""Searches the weight of the labels, the temperature and the learning rate for distilling a classifier.

    python NLP/scripts/search.py --dataset intents --teacher runs/NLP/base/stages/teacher

Optuna suggests hyperparameters, transformers' Trainer trains a student with them, and the student is evaluated on the
validation split. The test split is not used. The teacher is a trained classifier, in this example that of a run of
distill_base.sh. Its logits are cached for all trials. The control is a trial on labels alone, at the geometric mean of
the range of learning rates. Writes search.json, search.md, search.png and best.yaml.
"""

from dataclasses import replace

from kd.common.cli import parse, reject_unused, run, show_help
from kd.nlp.student_model.arguments import LabelledTextArguments
from kd.nlp.student_model.search_arguments import SearchArguments, SearchTrainingArguments

ARGUMENTS = LabelledTextArguments, SearchArguments, SearchTrainingArguments
if __name__ == "__main__":
    show_help(*ARGUMENTS)  # before the imports below, which take seconds

from transformers import set_seed

from kd.common.utils.errors import UserError
from kd.nlp.data.loading import TextData, Texts
from kd.nlp.student_model.bottleneck_classifier import BottleneckClassifier
from kd.nlp.student_model.evaluation import chance_warning, evaluate
from kd.nlp.student_model.layers import cut_layers, disable_dropout
from kd.nlp.student_model.methods import check_smoothing
from kd.nlp.student_model.search import SearchRun, run_trials, write_search_report
from kd.nlp.student_model.teacher_outputs import cached_outputs
from kd.nlp.student_model.training import set_trainable
from kd.nlp.teacher_model.teacher import (
    Pretrained,
    in_label_order,
    load_trained,
    models_and_tokenizers,
    number_of_layers,
)
from kd.nlp.teacher_model.untrained import load_student


def main() -> None:
    text, args, training = parse(*ARGUMENTS)
    reject_unused("--search sets it", training, *args.search)
    reason = "trials save no checkpoints and have no bottleneck"
    reject_unused(reason, training, "save_strategy", "save_steps", "save_total_limit", "value_learning_rate")
    reject_unused("a search has no verdict", training, "margin")
    if training.load_best_model_at_end:
        raise UserError("trials save no checkpoints: leave out --load_best_model_at_end")
    if training.world_size > 1:
        raise UserError("a search runs in one process: start it without torchrun or accelerate launch")
    data = in_label_order(args.teacher, text.load())
    data = replace(data, splits={split: rows for split, rows in data.splits.items() if split != "test"})
    if data.task == "regression" and "temperature" in args.search:
        raise UserError(
            f"{data.name} is a regression task, whose loss has no temperature: pass --search alpha learning_rate"
        )
    if data.task == "token_classification":
        raise UserError(f"a search classifies texts, and {data.name} has tags of words: use distill_classifier.py")
    check_smoothing(training, data.name, data.num_labels)
    set_seed(training.seed)  # determines the head of a student that is loaded without one
    teacher = load_trained(args.teacher, data)
    student = plain_student(args, data, teacher)
    for model in (teacher, student):
        model.set_max_length(text.max_length)
    texts = Texts.of(data, student.tokenizer)
    teacher_texts = Texts.of(data, teacher.tokenizer) if args.student else texts
    search_run = SearchRun(training, text, args)
    search_run.check_inputs(data.fingerprint, **models_and_tokenizers({"teacher": teacher, "student": student}))

    entry, _ = evaluate(args.teacher, teacher.model, teacher_texts)
    search_run.warn(chance_warning(entry, teacher_texts))
    outputs = cached_outputs(search_run, teacher.model, teacher_texts)
    disable_dropout(student.model)
    set_trainable(student.model, freeze_embeddings=not student.from_scratch)  # as in distill_classifier.py
    inputs = student.model, texts, outputs
    control = None
    if not training.no_control:
        control = run_trials(search_run, "control", args.control_ranges, 1, *inputs)[0]
    trials = run_trials(search_run, "trials", args.ranges, args.trials, *inputs)
    write_search_report(search_run, text, args, texts, trials, control)


def plain_student(args: SearchArguments, data: TextData, teacher: Pretrained) -> Pretrained:
    """The initial student of every trial: the model of --student, or a cut of the teacher."""
    pretrained = load_student(args.student, data, teacher) if args.student else teacher
    if isinstance(pretrained.model, BottleneckClassifier):
        raise UserError(f"{args.student or args.teacher} has a bottleneck: name a plain student with --student")
    if args.student:
        return pretrained
    layers = args.student_layers or max(1, number_of_layers(teacher) // 2)
    return Pretrained(cut_layers(teacher.model, layers), teacher.tokenizer)


if __name__ == "__main__":
    run(main)
