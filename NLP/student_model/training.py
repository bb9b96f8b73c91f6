"""The steps of distilling a text classifier: teacher, control and student, each a stage of a run."""

import copy
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.utils import SAFE_WEIGHTS_NAME

from kd.common.methods import Method
from kd.common.pretrained import reading, stage_loader
from kd.common.training.arguments import KDTrainingArguments
from kd.common.training.run import TrainerRun
from kd.nlp.data.tokenized import Texts
from kd.nlp.student_model.arguments import MatchingArguments, PairArguments
from kd.nlp.student_model.bottleneck_classifier import Pooling
from kd.nlp.student_model.evaluation import trainer_metrics
from kd.nlp.student_model.inputs import Inputs
from kd.nlp.student_model.layers import cut_layers
from kd.nlp.student_model.methods import (
    PLAIN,
    attentions,
    embeddings,
    hidden_states,
    labels_and_logits,
    labels_only,
    text_method,
)
from kd.nlp.student_model.teacher_outputs import teacher_kwargs
from kd.nlp.teacher_model.teacher import Pretrained, encoder_of, models_and_tokenizers

read_stage = stage_loader(AutoModelForSequenceClassification)


def open_run(inputs: Inputs, training: KDTrainingArguments, *arguments: Any) -> TrainerRun:
    """Opens the output folder for a run that starts from `inputs`, or continues one that did."""
    run = TrainerRun(training, *arguments)
    run.check_inputs(inputs.data.fingerprint, **models_and_tokenizers(inputs.starts))
    return run


def classifier_method(
    matching: MatchingArguments,
    training: KDTrainingArguments,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    texts: Texts,
) -> Method:
    """What a plain student is trained for; the seed decides the initial weights of auxiliary modules."""
    set_seed(training.seed)
    if matching.method == PLAIN:
        method = labels_and_logits(texts.data, training)
    else:
        method = text_method(matching.method, training, student, teacher, texts, "cls")
    if weight := matching.hidden_weight:
        method += hidden_states(student, teacher, weight, matching.hidden_loss, matching.layer_map, "cls")
    if weight := matching.embedding_weight:
        method += embeddings(student, teacher, weight, matching.hidden_loss)
    if weight := matching.attention_weight:
        method += attentions(student, teacher, weight, matching.layer_map)
    return method


def fine_tune(
    run: TrainerRun,
    name: str,
    model: PreTrainedModel,
    texts: Texts,
    method: Method,
    *,
    epochs: float,
    learning_rate: float,
    freeze_embeddings: bool = True,
    teacher: dict[str, Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> PreTrainedModel:
    """The stage `name`: a classifier trained end to end, on labels alone, or with a teacher (see `teacher_kwargs`) and
    then without dropout. `tokenizer` is saved with it, that of `texts` by default.
    """

    def train() -> PreTrainedModel:
        if teacher is not None:
            switch_off_dropout(model)
        set_trainable(model, freeze_embeddings)
        return run.train(
            name,
            model,
            {"num_train_epochs": epochs, "learning_rate": learning_rate},
            objective=method.objective,
            features=method.features,
            train_dataset=texts.train,
            eval_dataset=texts.validation,
            data_collator=texts.collate,
            not_for_student=texts.unused_by(model),
            compute_metrics=trainer_metrics(texts.data),
            **(teacher or {}),
        )

    return run.stage(name, train, read_stage, tokenizer or texts.collate.tokenizer)


def initial_rate(start: Pretrained, pair: PairArguments, training: KDTrainingArguments) -> float:
    """The learning rate of fine-tuning from these weights, or from a cut of them."""
    return pair.from_scratch_learning_rate if start.from_scratch else training.learning_rate


def load_or_train_teacher(
    run: TrainerRun, inputs: Inputs, pair: PairArguments, name: str = "teacher"
) -> PreTrainedModel:
    """A teacher that is trained already as it is, any other fine-tuned on the labels as the stage `name`."""
    start = inputs.teacher
    if start.trained:
        return start.model
    return fine_tune(
        run,
        name,
        copy.deepcopy(start.model),  # the control is cut from what was loaded
        inputs.texts,
        labels_only(inputs.data, run.args),
        epochs=pair.from_scratch_epochs if start.from_scratch else pair.teacher_epochs,
        learning_rate=initial_rate(start, pair, run.args),
        freeze_embeddings=not start.from_scratch,
    )


def train_control(
    run: TrainerRun,
    inputs: Inputs,
    pair: PairArguments,
    epochs: float,
    name: str = "control",
) -> PreTrainedModel:
    """The student without the teacher: the same cut of the encoder as it was loaded, as many epochs, labels alone."""
    start = inputs.student or inputs.control_init or inputs.teacher
    model = copy.deepcopy(start.model) if inputs.student else cut_layers(start.model, inputs.student_layers)
    return fine_tune(
        run,
        name,
        model,
        inputs.student_texts,
        labels_only(inputs.data, run.args),
        epochs=epochs,
        learning_rate=initial_rate(start, pair, run.args),
        freeze_embeddings=not start.from_scratch,
    )


def student_from(
    inputs: Inputs, teacher: PreTrainedModel, source: Literal["teacher", "pretrained"] = "teacher"
) -> PreTrainedModel:
    """The student before its training: that of --student, or a cut of the trained teacher or of what it was."""
    if inputs.student:
        return copy.deepcopy(inputs.student.model)
    return cut_layers(teacher if source == "teacher" else inputs.teacher.model, inputs.student_layers)


def align(
    run: TrainerRun,
    encoder: PreTrainedModel,
    teacher: PreTrainedModel,
    inputs: Inputs,
    pair: PairArguments,
    pooling: Pooling,
) -> PreTrainedModel:
    """The stage `student_encoder`: the student's encoder, in place, trained on texts without labels to have the hidden
    states of the teacher's layers at the same relative depth, and without dropout. No epochs leave it as it is.

    A pooler is left alone: not every system that shares the stage has one.
    """
    name, texts = "student_encoder", inputs.texts
    if not pair.align_epochs:
        return encoder

    def train() -> PreTrainedModel:
        switch_off_dropout(encoder)
        for part in (encoder.get_input_embeddings(), getattr(encoder, "pooler", None)):
            if part is not None:
                part.requires_grad_(False)  # copied from the teacher, or without effect on the hidden states
        target = encoder_of(teacher)
        method = hidden_states(encoder, target, 1.0, pooling=pooling)
        return run.train(
            name,
            encoder,
            {"num_train_epochs": pair.align_epochs, "learning_rate": pair.align_learning_rate},
            objective=method.objective,
            features=method.features,
            train_dataset=texts.train.remove_columns("labels"),
            data_collator=texts.collate,
            not_for_student=texts.unused_by(encoder),
            **teacher_kwargs(run, target, texts, method, logits=False),
        )

    def load(stage: str) -> PreTrainedModel:
        with reading(stage, "a finished stage"):
            aligned = load_file(Path(stage) / SAFE_WEIGHTS_NAME)
        kept = {weight: tensor for weight, tensor in aligned.items() if not weight.startswith("pooler.")}
        encoder.load_state_dict(encoder.state_dict() | kept)
        return encoder

    return run.stage(name, train, load, inputs.student_texts.collate.tokenizer)


def control_epochs(run: TrainerRun, pair: PairArguments) -> float:
    """As many as the student has, of alignment and of fine-tuning."""
    return pair.align_epochs + run.args.num_train_epochs


def train_student(
    run: TrainerRun,
    inputs: Inputs,
    pair: PairArguments,
    matching: MatchingArguments,
    teacher: PreTrainedModel,
) -> PreTrainedModel:
    """The encoder is aligned with the teacher's, then all of it is trained on labels and the teacher's outputs."""
    texts = inputs.texts if inputs.same_tokens else inputs.student_texts
    student = student_from(inputs, teacher, matching.student_from)
    align(run, encoder_of(student), teacher, inputs, pair, "cls")
    method = classifier_method(matching, run.args, student, teacher, inputs.texts)
    ensemble = [(other.model, Texts.of(inputs.data, other.tokenizer)) for other in inputs.ensemble]
    outputs = teacher_kwargs(run, teacher, inputs.texts, method, ensemble=ensemble)
    rate = matching.student_learning_rate
    return fine_tune(
        run,
        "student",
        student,
        texts,
        method,
        epochs=run.args.num_train_epochs,
        learning_rate=initial_rate(inputs.student or inputs.teacher, pair, run.args) if rate is None else rate,
        teacher=outputs,
        tokenizer=inputs.student_texts.collate.tokenizer,
    )


def set_trainable(model: PreTrainedModel, freeze_embeddings: bool = True) -> None:
    model.requires_grad_(True)
    model.get_input_embeddings().requires_grad_(not freeze_embeddings)


def switch_off_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
