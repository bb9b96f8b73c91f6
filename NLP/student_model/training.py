"""The stages of distilling a text classifier, with or without a bottleneck: teacher, control and student."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.utils import SAFE_WEIGHTS_NAME

from kd.common.bottleneck.training import Samples, train_bottleneck
from kd.common.methods import Method
from kd.common.pretrained import reading, stage_loader
from kd.common.training.arguments import KDTrainingArguments, Keys
from kd.common.training.inference import column_array
from kd.common.training.run import TrainerRun
from kd.common.training.teacher_outputs import JoinedOutputs, TeacherOutputs, cache_teacher_outputs
from kd.common.utils.errors import UserError
from kd.nlp.data.loading import Texts
from kd.nlp.student_model.arguments import MatchingArguments, PairArguments, TextBottleneckArguments
from kd.nlp.student_model.bottleneck_classifier import BottleneckClassifier, Pooling
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
    width,
)
from kd.nlp.student_model.words import WordOutputs
from kd.nlp.teacher_model.teacher import Pretrained, auto_class, encoder_of, models_and_tokenizers

FEATURE_BYTES = 4 * 2**30  # hidden states above this size are not cached; the teacher then runs in every step
KEY_TEXTS = 20_000  # keys are fitted to the embeddings of at most this many texts


def open_run(inputs: Inputs, training: KDTrainingArguments, *arguments: Any) -> TrainerRun:
    """Opens the output folder for a new run, or continues the run in it.

    Raises UserError if that run started from other data or models.
    """
    run = TrainerRun(training, *arguments)
    run.check_inputs(inputs.data.fingerprint, **models_and_tokenizers(inputs.models))
    return run


# ---- outputs of the frozen teacher ----


def teacher_kwargs(
    run: TrainerRun,
    teacher: PreTrainedModel,
    texts: Texts,
    method: Method,
    *,
    logits: bool = True,
    ensemble: Sequence[tuple[PreTrainedModel, Texts]] = (),
    ensemble_weights: Sequence[float] | None = None,
    student_texts: Texts | None = None,
) -> dict[str, Any]:
    """The arguments of KDTrainer for a frozen teacher: its cached outputs, or the model itself if the features of
    `method` exceed FEATURE_BYTES. Both record features with hooks on the same submodules.

    Args:
        logits: Whether the method needs logits.
        ensemble: Further teachers, each with the texts tokenized for it. Their logits are averaged with the teacher's,
            which is the geometric mean of the distributions (arXiv:1503.02531).
        ensemble_weights: One weight for the teacher and for each of the ensemble (default: equal).
        student_texts: The texts in the student's tokens, if these may differ: the logits of words are then moved to
            them.

    Raises UserError if an ensemble would have to run in every step.
    """
    paths = method.teacher_features
    if column_array(texts.train, "length").sum() * len(paths) * width(teacher) * 2 > FEATURE_BYTES:
        if ensemble:
            raise UserError(
                "an ensemble needs cached hidden states, and these are too large to cache: use one teacher"
            )
        return {"teacher": teacher, "teacher_features": paths}
    caches = [cached_outputs(run, teacher, texts, paths, logits)]
    caches += [cached_outputs(run, model, tokens) for model, tokens in ensemble]
    if texts.data.task == "token_classification" and student_texts:
        sources = [texts, *(tokens for _, tokens in ensemble)]
        caches = [
            cache if source is student_texts else WordOutputs(cache, source, student_texts)
            for cache, source in zip(caches, sources, strict=True)
        ]
    return {"teacher_outputs": JoinedOutputs(caches, ensemble_weights) if ensemble else caches[0]}


def cached_outputs(
    run: TrainerRun,
    teacher: PreTrainedModel,
    texts: Texts,
    features: dict[str, str] | None = None,
    logits: bool = True,
) -> TeacherOutputs:
    """The teacher's outputs for the training texts: logits, and outputs of submodules by name, {name: path}."""
    folder = (run.shared or run.folder) / "teacher_outputs"
    with run.timed("teacher_outputs"):
        return cache_teacher_outputs(
            teacher,
            texts.train,
            texts.collate,
            folder,
            features=features,
            logits=logits,
            precision=run.args.precision,
        )


# ---- plain classifiers ----


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
    texts = inputs.texts if inputs.same_tokens else inputs.student_texts
    student = initial_student(inputs, teacher, matching.student_from)
    align(run, encoder_of(student), teacher, inputs, pair, head_pooling(texts))
    method = classifier_method(matching, run.args, student, teacher, inputs.texts)
    ensemble = [(other.model, Texts.of(inputs.data, other.tokenizer)) for other in inputs.ensemble]
    weights = matching.ensemble_weights
    outputs = teacher_kwargs(
        run, teacher, inputs.texts, method, ensemble=ensemble, ensemble_weights=weights, student_texts=texts
    )
    rate = matching.student_learning_rate
    return fine_tune(
        run,
        "student",
        student,
        texts,
        method,
        epochs=run.args.num_train_epochs,
        learning_rate=learning_rate_of(inputs.student or inputs.teacher, pair, run.args) if rate is None else rate,
        teacher=outputs,
        tokenizer=inputs.student_texts.collate.tokenizer,
    )


def head_pooling(texts: Texts) -> Pooling:
    """The hidden states that the head of a classifier reads: those of all tokens for token_classification."""
    return "tokens" if texts.data.task == "token_classification" else "cls"


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
    texts: Texts,
) -> Method:
    """The method of a plain student. The seed determines the initial weights of auxiliary modules."""
    set_seed(training.seed)
    if matching.method == PLAIN:
        method = labels_and_logits(texts.data, training)
    else:
        method = text_method(matching.method, training, student, teacher, texts, "cls")
    if weight := matching.hidden_weight:
        method += hidden_states(
            student, teacher, weight, matching.hidden_loss, matching.layer_map, head_pooling(texts)
        )
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
    pooling: Pooling,
) -> PreTrainedModel:
    """The stage `student_encoder`: trains the student's encoder, in place, to match the hidden states of the teacher's
    layers at the same relative depth. It uses no labels and no dropout. --align_epochs 0 skips the stage.

    The weights of a pooler do not change, because some of the systems that share this stage have no pooler.
    """
    name, texts = "student_encoder", inputs.texts
    if not pair.align_epochs:
        return encoder

    def train() -> PreTrainedModel:
        disable_dropout(encoder)
        for part in (encoder.get_input_embeddings(), getattr(encoder, "pooler", None)):
            if part is not None:
                part.requires_grad_(False)  # copied from the teacher, or without effect on the hidden states
        teacher_encoder = encoder_of(teacher)
        method = hidden_states(encoder, teacher_encoder, 1.0, pooling=pooling)
        return run.train(
            name,
            encoder,
            {"num_train_epochs": pair.align_epochs, "learning_rate": pair.align_learning_rate},
            objective=method.objective,
            features=method.features,
            train_dataset=texts.train.remove_columns("labels"),
            data_collator=texts.collate,
            not_for_student=texts.unused_inputs(encoder),
            **teacher_kwargs(run, teacher_encoder, texts, method, logits=False),
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


# ---- classifiers with a bottleneck after a frozen encoder ----


def train_bottleneck_teacher(
    run: TrainerRun, inputs: Inputs, pair: PairArguments, bottleneck: TextBottleneckArguments
) -> PreTrainedModel:
    """Trains the teacher: a fine-tuned classifier, whose head a bottleneck replaces with --bottleneck both."""
    if bottleneck.freeze_teacher_encoder:
        classifier = inputs.teacher.model
    else:
        classifier = load_or_train_teacher(run, inputs, pair, "teacher_encoder")
    if bottleneck.bottleneck == "student" or isinstance(classifier, BottleneckClassifier):
        return classifier
    return add_bottleneck(run, "teacher", encoder_of(classifier), inputs.texts, bottleneck)


def train_bottleneck_control(
    run: TrainerRun,
    inputs: Inputs,
    pair: PairArguments,
    bottleneck: TextBottleneckArguments,
    encoder_epochs: float,
) -> PreTrainedModel:
    """Trains the control, which has the student's network: first the encoder, then the bottleneck, on labels alone."""
    classifier = train_control(run, inputs, pair, encoder_epochs, "control_encoder")
    return add_bottleneck(run, "control", encoder_of(classifier), inputs.student_texts, bottleneck)


def train_bottleneck_student(
    run: TrainerRun,
    inputs: Inputs,
    pair: PairArguments,
    bottleneck: TextBottleneckArguments,
    teacher: PreTrainedModel,
) -> PreTrainedModel:
    """Aligns the student's encoder with the teacher's, then trains the values on labels and the teacher's logits."""
    keys = bottleneck.keys
    student = initial_student(inputs, encoder_of(teacher))
    encoder = align(run, encoder_of(student), teacher, inputs, pair, bottleneck.pooling)
    return add_bottleneck(
        run,
        "student",
        encoder,
        inputs.student_texts,
        bottleneck,
        keys,
        source=teacher if isinstance(teacher, BottleneckClassifier) else None,
        teacher_outputs=None if keys == "reused" else cached_outputs(run, teacher, inputs.texts),
    )


def add_bottleneck(
    run: TrainerRun,
    name: str,
    encoder: PreTrainedModel,
    texts: Texts,
    bottleneck: TextBottleneckArguments,
    keys: Keys = "new",
    *,
    source: BottleneckClassifier | None = None,
    teacher_outputs: TeacherOutputs | None = None,
) -> PreTrainedModel:
    """The stage `name`: trains a bottleneck after a frozen encoder, on labels and on the teacher's logits, if any.

    `source` is the model whose keys are carried or reused.
    """

    def train() -> PreTrainedModel:
        args = run.args
        labels = dict(enumerate(texts.data.label_names)) or {0: "LABEL_0"}
        model = BottleneckClassifier.from_encoder(encoder, labels, bottleneck.pooling, **bottleneck.shape())
        arguments = bottleneck.value_arguments(args.value_learning_rate or args.learning_rate)
        if teacher_outputs is None:
            train, method = texts.labelled_train, labels_only(texts.data, args)
        else:
            train, method = texts.train, labels_and_logits(texts.data, args)
        train_labels = torch.from_numpy(column_array(train, "labels"))
        return train_bottleneck(
            run,
            name,
            model,
            keys,
            source.bottleneck if source else None,
            arguments | {"train_sampling_strategy": "random"},
            _samples(texts, train),
            _samples(texts, texts.validation),
            key_rows=_random_rows(texts.train, KEY_TEXTS, args.seed),
            samples=len(texts.train),
            objective=method.for_labels(train_labels).objective,
            teacher_outputs=teacher_outputs,
            compute_metrics=trainer_metrics(texts.data),
        )

    return run.stage(name, train, stage_loader(auto_class(texts.data)), texts.collate.tokenizer)


def _samples(texts: Texts, rows: Dataset) -> Samples:
    labels, sample_ids = (torch.from_numpy(column_array(rows, name)) for name in ("labels", "sample_id"))
    return Samples(rows, texts.collate, labels, sample_ids)


def _random_rows(rows: Dataset, most: int, seed: int) -> Dataset:
    return rows.shuffle(seed=seed).select(range(most)) if len(rows) > most else rows
