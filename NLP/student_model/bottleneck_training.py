"""The stages of distilling a text classifier with a bottleneck after a frozen encoder: teacher, control, student."""

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from kd.common.bottleneck.training import Samples, train_bottleneck
from kd.common.data.fingerprints import dataset_hash
from kd.common.pretrained import stage_loader
from kd.common.training.arguments import Keys
from kd.common.training.inference import column_array
from kd.common.training.teacher_outputs import TeacherOutputs
from kd.common.training.trainer_run import TrainerRun
from kd.nlp.data.loading import Texts
from kd.nlp.student_model.arguments import PairArguments, TextBottleneckArguments
from kd.nlp.student_model.bottleneck_classifier import BottleneckClassifier
from kd.nlp.student_model.evaluation import trainer_metrics
from kd.nlp.student_model.inputs import Inputs
from kd.nlp.student_model.methods import labels_and_logits, labels_only
from kd.nlp.student_model.teacher_outputs import cached_outputs
from kd.nlp.student_model.training import align, initial_student, load_or_train_teacher, train_control
from kd.nlp.teacher_model.teacher import auto_class, encoder_of

KEY_TEXTS = 20_000  # keys are fitted to the embeddings of at most this many texts


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
    """Aligns the student's encoder with the teacher's, then trains the values on labels and the teacher's logits, or
    counts the labels.
    """
    keys = bottleneck.keys
    student = initial_student(inputs, encoder_of(teacher))
    encoder = align(run, encoder_of(student), teacher, inputs, pair, (bottleneck.pooling, bottleneck.pooling))
    return add_bottleneck(
        run,
        "student",
        encoder,
        inputs.student_texts,
        bottleneck,
        keys,
        source=teacher if isinstance(teacher, BottleneckClassifier) else None,
        teacher_outputs=cached_outputs(run, teacher, inputs.texts) if bottleneck.has_soft_targets else None,
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
            samples_of(texts, train),
            samples_of(texts, texts.validation),
            key_rows=_random_rows(texts.train, KEY_TEXTS, args.seed),
            samples=len(texts.train),
            objective=method.for_labels(train_labels).objective,
            teacher_outputs=teacher_outputs,
            compute_metrics=trainer_metrics(texts.data),
        )

    return run.stage(name, train, stage_loader(auto_class(texts.data)), texts.collate.tokenizer)


def samples_of(texts: Texts, rows: Dataset) -> Samples:
    labels, sample_ids = (torch.from_numpy(column_array(rows, name)) for name in ("labels", "sample_id"))
    return Samples(rows, texts.collate, labels, sample_ids, dataset_hash(rows))


def _random_rows(rows: Dataset, most: int, seed: int) -> Dataset:
    return rows.shuffle(seed=seed).select(range(most)) if len(rows) > most else rows
