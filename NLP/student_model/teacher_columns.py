"""Distillation from the outputs of a teacher that are columns of the data. No teacher model is loaded."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, set_seed

from kd.common.cli import reject_unused
from kd.common.training.arguments import KDTrainingArguments
from kd.common.training.inference import column_array
from kd.common.training.teacher_columns import check_method as check_columns
from kd.common.training.teacher_columns import measure_outputs, outputs_of_columns, where_outputs
from kd.common.training.teacher_outputs import TeacherOutputs
from kd.common.training.trainer_run import TrainerRun
from kd.common.utils.errors import UserError
from kd.nlp.data.loading import TextData, Texts
from kd.nlp.student_model.arguments import MatchingArguments, PairArguments, TeacherColumnArguments
from kd.nlp.student_model.evaluation import report
from kd.nlp.student_model.inputs import Inputs
from kd.nlp.student_model.methods import (
    PLAIN,
    check_method,
    check_needs_no_labels,
    check_smoothing,
    labels_and_logits,
    needs_features,
    text_method,
)
from kd.nlp.student_model.training import fine_tune, learning_rate_of, open_run, train_control
from kd.nlp.teacher_model import TINY_BERT
from kd.nlp.teacher_model.untrained import load_student


def distill_from_columns(
    text: TeacherColumnArguments, pair: PairArguments, matching: MatchingArguments, training: KDTrainingArguments
) -> None:
    """Trains a student on labels and the outputs in the data, and a control on the labels alone, for each seed."""
    reject_unused_flags(pair, matching)
    data = text.load()
    check_smoothing(training, data.name, data.num_labels)
    check_method(matching.method, training, data.name, data.num_labels)
    pair.student = pair.student or TINY_BERT
    inputs = load_inputs(text, pair, data, training.seed)
    validate(inputs, matching, training)
    parent_run = open_run(inputs, training, text, pair, matching)
    outputs = outputs_of_columns(logits_of(data))
    measured = measure_teacher(parent_run, data)
    for run in parent_run.each_seed():
        if run.args.seed != training.seed:
            inputs = load_inputs(text, pair, data, run.args.seed)
        control = None if training.no_control else train_control(run, inputs, pair, training.num_train_epochs)
        student = train_student(run, inputs, pair, matching, outputs)
        report(run, inputs, matching.method, pair.student, None, None, control, student, **measured)
    parent_run.summarize()


def reject_unused_flags(pair: PairArguments, matching: MatchingArguments) -> None:
    """Raises UserError for flags of a teacher model."""
    reason = "the teacher is --teacher_columns"
    for_models = "teacher", "teacher_epochs", "student_layers", "control_init", "align_epochs", "align_learning_rate"
    reject_unused(reason, pair, *for_models, "from_scratch_epochs")
    for_features = "hidden_weight", "embedding_weight", "attention_weight"
    reject_unused(reason, matching, "ensemble_teachers", "ensemble_weights", "student_from", *for_features)


def load_inputs(text: TeacherColumnArguments, pair: PairArguments, data: TextData, seed: int) -> Inputs:
    """The data and the initial student, which stands in for the teacher that the data replace. The seed sets random
    weights.
    """
    set_seed(seed)
    student = load_student(str(pair.student), data, None)
    student.set_max_length(text.max_length)
    texts = Texts.of(data, student.tokenizer)
    return Inputs(data, student, student, None, [], texts, texts, 0)


def validate(inputs: Inputs, matching: MatchingArguments, training: KDTrainingArguments) -> None:
    """Raises UserError for a method that the outputs do not support, and for a control without labels."""
    data, spec = inputs.data, matching.method
    assert data.teacher is not None
    if not len(inputs.texts.labelled_train) and not training.no_control:
        raise UserError("no row of train has a label, so there is nothing to train a control on: pass --no_control")
    if len(inputs.texts.labelled_train) < len(inputs.texts.train):
        check_needs_no_labels(spec)
    check_columns(spec, needs_features(spec), data.teacher, logits_of(data))


def logits_of(data: TextData, split: str = "train") -> np.ndarray:
    """The teacher's logits (rows, classes) of a split, NaN in rows without an output."""
    return column_array(data.splits[split], "teacher")


def measure_teacher(run: TrainerRun, data: TextData) -> dict[str, Any]:
    """The teacher's description and metrics (see `measure_outputs`) for the results."""
    assert data.teacher is not None
    splits = {
        split: (column_array(rows, "label"), logits_of(data, split))
        for split, rows in data.splits.items()
        if "teacher" in rows.column_names
    }
    measured = measure_outputs(run, data.teacher, data.scores, data.primary_metric, splits)
    return {"teacher_columns": data.teacher.description, "teacher_outputs": measured}


def train_student(
    run: TrainerRun, inputs: Inputs, pair: PairArguments, matching: MatchingArguments, outputs: TeacherOutputs
) -> PreTrainedModel:
    """The stage `student`: trains on labels and the teacher's outputs, each where a row has it."""
    data, texts, start = inputs.data, inputs.texts, inputs.teacher
    student = copy.deepcopy(start.model)
    set_seed(run.args.seed)
    if matching.method == PLAIN:
        method = labels_and_logits(data, run.args)
    else:
        method = text_method(matching.method, run.args, student, student, texts)
    method = replace(method, terms=where_outputs(method.terms, logits_of(data)))
    rate = matching.student_learning_rate
    return fine_tune(
        run,
        "student",
        student,
        texts,
        method.for_labels(torch.from_numpy(column_array(texts.train, "labels"))),
        epochs=run.args.num_train_epochs,
        learning_rate=learning_rate_of(start, pair, run.args) if rate is None else rate,
        freeze_embeddings=not start.from_scratch,
        teacher={"teacher_outputs": outputs},
    )
