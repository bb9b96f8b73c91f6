"""Searches the weight of the labels, the temperature and the learning rate with which a classifier is best distilled.

    python NLP/scripts/search.py NLP/scripts/search.yaml --dataset intents --teacher runs/NLP/base/stages/teacher

Optuna suggests, transformers' Trainer trains, the validation split decides; the test split is not read. The teacher is
a trained classifier (here that of a run of distill_base.sh) and speaks once for all trials. A trial on labels alone,
at the middle of the learning rates, shows what the search found. Leaves search.json, search.md, search.png, best.yaml.
"""

from dataclasses import replace

from transformers import set_seed

from kd.common.cli import parse, reject_unused, run
from kd.common.training.arguments import KDTrainingArguments
from kd.common.utils.errors import UserError
from kd.nlp.data.loading import TextData
from kd.nlp.data.tokenized import Texts
from kd.nlp.student_model.arguments import SearchArguments, TextArguments
from kd.nlp.student_model.bottleneck_classifier import BottleneckClassifier
from kd.nlp.student_model.evaluation import evaluate, guessing
from kd.nlp.student_model.layers import cut_layers, layer_paths
from kd.nlp.student_model.methods import check_smoothing
from kd.nlp.student_model.pipeline import Pipeline
from kd.nlp.student_model.search import Search, SearchRun
from kd.nlp.student_model.search_report import Report
from kd.nlp.teacher_model.teacher import (
    Pretrained,
    in_label_order,
    load_classifier,
    load_trained,
    models_and_tokenizers,
)


def main() -> None:
    text, args, training = parse(TextArguments, SearchArguments, KDTrainingArguments)
    reject_unused("--search varies it", training, *args.search)
    reason = "trials keep no checkpoints, and have no bottleneck"
    reject_unused(reason, training, "save_strategy", "save_steps", "save_total_limit", "value_learning_rate")
    if training.load_best_model_at_end:
        raise UserError("trials keep no checkpoints: leave out --load_best_model_at_end")
    if training.world_size > 1:
        raise UserError("a search runs in one process: call this script without torchrun or accelerate launch")
    data = in_label_order(args.teacher, text.load())
    data = replace(data, splits={split: rows for split, rows in data.splits.items() if split != "test"})
    if data.regression and "temperature" in args.search:
        raise UserError(f"{data.name} is a regression, whose loss has no temperature: --search alpha learning_rate")
    check_smoothing(training, data.name, data.num_labels)
    set_seed(training.seed)  # for the random head of a student that comes without one
    teacher = load_trained(args.teacher, data)
    student = plain_student(args, data, teacher)
    for classifier in (teacher, student):
        classifier.cut_texts(text.max_length)
    texts = Texts.of(data, student.tokenizer)
    texts_of_teacher = Texts.of(data, teacher.tokenizer) if args.student else texts

    search_run = SearchRun(training, text, args)
    starts = {"teacher": teacher, "student": student}
    search_run.check_inputs(data.fingerprint, **models_and_tokenizers(starts))
    entry, _ = evaluate(args.teacher, teacher.model, data, texts_of_teacher.splits, texts_of_teacher.collate)
    search_run.warn(guessing(entry, data, texts_of_teacher.splits))
    said = Pipeline(search_run, "cls", search_run.folder / "teacher_outputs").listen(teacher.model, texts_of_teacher)
    search = Search(search_run, student.model, texts, said)
    control = None if training.no_control else search.trials("control", args.ranges_of_the_control, 1)[0]
    trials = search.trials("trials", args.ranges, args.trials)
    Report(text, args, search, trials, control).write()


def plain_student(args: SearchArguments, data: TextData, teacher: Pretrained) -> Pretrained:
    """The student that every trial starts with: named, or cut from the teacher."""
    given = load_classifier(args.student, data) if args.student else teacher
    if isinstance(given.model, BottleneckClassifier):
        raise UserError(f"{args.student or args.teacher} has a bottleneck: name a plain student with --student")
    if args.student:
        return given
    layers = args.student_layers or max(1, len(layer_paths(teacher.encoder)) // 2)
    return Pretrained(cut_layers(teacher.model, layers), teacher.tokenizer)


if __name__ == "__main__":
    run(main)
