"""The stages of distilling a text classifier: teacher, control and student."""

import copy
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.utils import SAFE_WEIGHTS_NAME

from kd.common.methods import Method
from kd.common.pretrained import reading, stage_loader
from kd.common.training.arguments import KDTrainingArguments
from kd.common.training.trainer_run import TrainerRun
from kd.nlp.data.loading import Texts
from kd.nlp.student_model.arguments import MatchingArguments, PairArguments
from kd.nlp.student_model.evaluation import trainer_metrics
from kd.nlp.student_model.inputs import Inputs
from kd.nlp.student_model.layers import cut_layers, disable_dropout
from kd.nlp.student_model.methods import (
    PLAIN,
    attentions,
    embeddings,
    hidden_states,
    labels_and_logits,
    labels_only,
    text_method,
)
from kd.nlp.student_model.pooling import Pooling
from kd.nlp.student_model.teacher_outputs import teacher_kwargs
from kd.nlp.teacher_model.teacher import Pretrained, auto_class, encoder_of, models_and_tokenizers


def open_run(inputs: Inputs, training: KDTrainingArguments, *arguments: Any) -> TrainerRun:
    """Opens the output folder for a new run, or continues the run in it.

    Raises UserError if that run started from other data or models.
    """
    run = TrainerRun(training, *arguments)
    run.check_inputs(inputs.data.fingerprint, **models_and_tokenizers(inputs.models))
    return run


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
    """The stage `name`: trains a whole classifier.

    Args:
        teacher: Result of `teacher_kwargs`. The model then trains without dropout. None trains on the rows with a
            label alone, for as many updates.
        tokenizer: Saved with the model. Default: the tokenizer of `texts`.
    """

    def train() -> PreTrainedModel:
        if teacher is not None:
            disable_dropout(model)
        set_trainable(model, freeze_embeddings)
        return run.train(
            name,
            model,
            {"num_train_epochs": epochs, "learning_rate": learning_rate},
            objective=method.objective,
            features=method.features,
            samples=len(texts.train),
            train_dataset=texts.labelled_train if teacher is None else texts.train,
            eval_dataset=texts.validation,
            data_collator=texts.collate,
            not_for_student=texts.unused_inputs(model),
            compute_metrics=trainer_metrics(texts.data),
            **(teacher or {}),
        )

    return run.stage(name, train, stage_loader(auto_class(texts.data)), tokenizer or texts.collate.tokenizer)


def load_or_train_teacher(
    run: TrainerRun, inputs: Inputs, pair: PairArguments, name: str = "teacher"
) -> PreTrainedModel:
    """Returns the loaded teacher if it is trained on these labels. Otherwise the stage `name` fine-tunes it."""
    pretrained = inputs.teacher
    if pretrained.trained:
        return pretrained.model
    epochs = pair.from_scratch_epochs if pretrained.from_scratch else pair.teacher_epochs
    return train_teacher(run, inputs, epochs, learning_rate_of(pretrained, pair, run.args), name)


def train_teacher(
    run: TrainerRun, inputs: Inputs, epochs: float, learning_rate: float, name: str = "teacher"
) -> PreTrainedModel:
    """The stage `name`: trains the teacher on labels alone."""
    return fine_tune(
        run,
        name,
        copy.deepcopy(inputs.teacher.model),  # the control is cut from the original
        inputs.texts,
        labels_only(inputs.data, run.args),
        epochs=epochs,
        learning_rate=learning_rate,
        freeze_embeddings=not inputs.teacher.from_scratch,
    )


def train_control(
    run: TrainerRun, inputs: Inputs, pair: PairArguments, epochs: float, name: str = "control"
) -> PreTrainedModel:
    """The stage `name`: trains the control on labels alone. It has the student's network and number of epochs. Its
    initial weights are those of the model before fine-tuning.
    """
    pretrained = inputs.student or inputs.control_init or inputs.teacher
    model = copy.deepcopy(pretrained.model) if inputs.student else cut_layers(pretrained.model, inputs.student_layers)
    return fine_tune(
        run,
        name,
        model,
        inputs.student_texts,
        labels_only(inputs.data, run.args),
        epochs=epochs,
        learning_rate=learning_rate_of(pretrained, pair, run.args),
        freeze_embeddings=not pretrained.from_scratch,
    )


def train_student(
    run: TrainerRun,
    inputs: Inputs,
    pair: PairArguments,
    matching: MatchingArguments,
    teacher: PreTrainedModel,
) -> PreTrainedModel:
    """Aligns the student's encoder with the teacher's, then trains the classifier on labels and teacher outputs."""
    texts = inputs.matched_texts
    student = initial_student(inputs, teacher, matching.student_from)
    align(run, encoder_of(student), teacher, inputs, pair, inputs.pooling)
    method = classifier_method(matching, run.args, student, teacher, inputs)
    ensemble = [(other.model, Texts.of(inputs.data, other.tokenizer)) for other in inputs.ensemble]
    weights = matching.ensemble_weights
    outputs = teacher_kwargs(
        run,
        teacher,
        inputs.texts,
        method,
        ensemble=ensemble,
        ensemble_weights=weights,
        student_texts=texts,
        pooling=inputs.pooling,
    )
    pretrained = inputs.student or inputs.teacher
    starts_random = pretrained.from_scratch and bool(inputs.student or matching.student_from == "pretrained")
    rate = matching.student_learning_rate
    return fine_tune(
        run,
        "student",
        student,
        texts,
        method,
        epochs=run.args.num_train_epochs,
        learning_rate=learning_rate_of(pretrained, pair, run.args) if rate is None else rate,
        freeze_embeddings=not starts_random,
        teacher=outputs,
        tokenizer=inputs.student_texts.collate.tokenizer,
    )


def initial_student(
    inputs: Inputs, teacher: PreTrainedModel, source: Literal["teacher", "pretrained"] = "teacher"
) -> PreTrainedModel:
    """The student before training: the model of --student, or a cut of the trained or of the pretrained teacher."""
    if inputs.student:
        return copy.deepcopy(inputs.student.model)
    return cut_layers(teacher if source == "teacher" else inputs.teacher.model, inputs.student_layers)


def learning_rate_of(pretrained: Pretrained, pair: PairArguments, training: KDTrainingArguments) -> float:
    """The learning rate for fine-tuning this model, or a cut of it."""
    return pair.from_scratch_learning_rate if pretrained.from_scratch else training.learning_rate


def classifier_method(
    matching: MatchingArguments,
    training: KDTrainingArguments,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    inputs: Inputs,
) -> Method:
    """The method of a plain student. The seed determines the initial weights of auxiliary modules."""
    set_seed(training.seed)
    texts = inputs.texts
    if matching.method == PLAIN:
        method = labels_and_logits(texts.data, training)
    else:
        method = text_method(matching.method, training, student, teacher, texts)
    if weight := matching.hidden_weight:
        method += hidden_states(student, teacher, weight, matching.hidden_loss, matching.layer_map, inputs.pooling[0])
    if weight := matching.embedding_weight:
        method += embeddings(student, teacher, weight, matching.hidden_loss)
    if weight := matching.attention_weight:
        method += attentions(student, teacher, weight, matching.layer_map)
    return method.for_labels(torch.from_numpy(texts.train_labels))


def align(
    run: TrainerRun,
    encoder: PreTrainedModel,
    teacher: PreTrainedModel,
    inputs: Inputs,
    pair: PairArguments,
    pooling: tuple[Pooling, Pooling],
) -> PreTrainedModel:
    """The stage `student_encoder`: trains the student's encoder, in place, to match the hidden states of the teacher's
    layers at the same relative depth. It uses no labels and no dropout. --align_epochs 0 skips the stage.

    `pooling` is what the heads of student and teacher read. The weights of a pooler do not change, because some of the
    systems that share this stage have no pooler.
    """
    name, texts = "student_encoder", inputs.matched_texts
    has_embeddings = not (inputs.student and inputs.student.from_scratch)
    if not pair.align_epochs:
        return encoder

    def train() -> PreTrainedModel:
        disable_dropout(encoder)
        encoder.get_input_embeddings().requires_grad_(not has_embeddings)
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler.requires_grad_(False)  # without effect on the hidden states
        teacher_encoder = encoder_of(teacher)
        method = hidden_states(encoder, teacher_encoder, 1.0, pooling=pooling[0])
        outputs = teacher_kwargs(
            run, teacher_encoder, inputs.texts, method, logits=False, student_texts=texts, pooling=pooling
        )
        return run.train(
            name,
            encoder,
            {"num_train_epochs": pair.align_epochs, "learning_rate": pair.align_learning_rate},
            objective=method.objective,
            features=method.features,
            train_dataset=texts.train.remove_columns("labels"),
            data_collator=texts.collate,
            not_for_student=texts.unused_inputs(encoder),
            **outputs,
        )

    def load(stage: str) -> PreTrainedModel:
        with reading(stage, "a finished stage"):
            aligned = load_file(Path(stage) / SAFE_WEIGHTS_NAME)
        kept = {weight: tensor for weight, tensor in aligned.items() if not weight.startswith("pooler.")}
        encoder.load_state_dict(encoder.state_dict() | kept)
        return encoder

    return run.stage(name, train, load, inputs.student_texts.collate.tokenizer)


def set_trainable(model: PreTrainedModel, freeze_embeddings: bool = True) -> None:
    model.requires_grad_(True)
    model.get_input_embeddings().requires_grad_(not freeze_embeddings)
