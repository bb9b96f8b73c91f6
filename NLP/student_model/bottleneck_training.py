"""Teacher, control and student with a discrete key-value bottleneck after a frozen text encoder."""

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from kd.common.bottleneck.arguments import Keys
from kd.common.bottleneck.training import Samples, train_bottleneck
from kd.common.training.run import TrainerRun
from kd.common.training.teacher_outputs import TeacherOutputs
from kd.nlp.data.loading import Texts
from kd.nlp.student_model.arguments import PairArguments, TextBottleneckArguments
from kd.nlp.student_model.bottleneck_classifier import BottleneckClassifier
from kd.nlp.student_model.evaluation import trainer_metrics
from kd.nlp.student_model.inputs import Inputs
from kd.nlp.student_model.methods import labels_and_logits, labels_only
from kd.nlp.student_model.teacher_outputs import cached_outputs
from kd.nlp.student_model.training import (
    align,
    load_or_train_teacher,
    read_stage,
    student_from,
    train_control,
)
from kd.nlp.teacher_model.teacher import encoder_of

KEY_TEXTS = 20_000  # keys are fitted to the embeddings of at most so many texts


def train_classifier_bottleneck(
    run: TrainerRun,
    name: str,
    encoder: PreTrainedModel,
    texts: Texts,
    bottleneck: TextBottleneckArguments,
    keys: Keys,
    *,
    source: BottleneckClassifier | None = None,
    teacher_outputs: TeacherOutputs | None = None,
) -> PreTrainedModel:
    """The stage `name`: a bottleneck after a frozen encoder, trained on labels and the teacher's logits, if any."""

    def train() -> PreTrainedModel:
        args = run.args
        labels = dict(enumerate(texts.data.label_names)) or {0: "LABEL_0"}
        model = BottleneckClassifier.around(encoder, labels, bottleneck.pooling, **bottleneck.shape())
        settings = bottleneck.value_settings(args.value_learning_rate or args.learning_rate)
        method = labels_only if teacher_outputs is None else labels_and_logits
        return train_bottleneck(
            run,
            name,
            model,
            keys,
            source.bottleneck if source else None,
            settings | {"train_sampling_strategy": "random"},
            _samples(texts, texts.train),
            _samples(texts, texts.validation),
            key_rows=_at_most(texts.train, KEY_TEXTS, args.seed),
            objective=method(texts.data, args).objective,
            teacher_outputs=teacher_outputs,
            compute_metrics=trainer_metrics(texts.data),
        )

    return run.stage(name, train, read_stage, texts.collate.tokenizer)


def _samples(texts: Texts, rows: Dataset) -> Samples:
    return Samples(rows, texts.collate, torch.tensor(rows["labels"]), torch.tensor(rows["sample_id"]))


def _at_most(rows: Dataset, number: int, seed: int) -> Dataset:
    return rows.shuffle(seed=seed).select(range(number)) if len(rows) > number else rows


def train_bottleneck_teacher(
    run: TrainerRun,
    inputs: Inputs,
    pair: PairArguments,
    bottleneck: TextBottleneckArguments,
) -> PreTrainedModel:
    """A fine-tuned classifier, whose head a bottleneck replaces where the system has the teacher have one."""
    classifier = (
        inputs.teacher.model
        if bottleneck.freeze_teacher_encoder
        else load_or_train_teacher(run, inputs, pair, "teacher_encoder")
    )
    if bottleneck.bottleneck == "student" or isinstance(classifier, BottleneckClassifier):
        return classifier
    return train_classifier_bottleneck(run, "teacher", encoder_of(classifier), inputs.texts, bottleneck, "new")


def train_bottleneck_control(
    run: TrainerRun,
    inputs: Inputs,
    pair: PairArguments,
    bottleneck: TextBottleneckArguments,
    encoder_epochs: float | None = None,
) -> PreTrainedModel:
    """A bottleneck behind the student's encoder, both trained on labels alone; the encoder by default for as many
    epochs as the student's is aligned.
    """
    epochs = pair.align_epochs if encoder_epochs is None else encoder_epochs
    classifier = train_control(run, inputs, pair, epochs, "control_encoder")
    encoder = encoder_of(classifier)
    return train_classifier_bottleneck(run, "control", encoder, inputs.student_texts, bottleneck, "new")


def train_bottleneck_student(
    run: TrainerRun,
    inputs: Inputs,
    pair: PairArguments,
    bottleneck: TextBottleneckArguments,
    teacher: PreTrainedModel,
) -> PreTrainedModel:
    """The encoder is aligned with the teacher's, then the values are trained on labels and the teacher's logits."""
    keys = bottleneck.keys
    encoder = align(run, encoder_of(student_from(inputs, encoder_of(teacher))), teacher, inputs, pair,
                    bottleneck.pooling)  # fmt: skip
    return train_classifier_bottleneck(
        run,
        "student",
        encoder,
        inputs.student_texts,
        bottleneck,
        keys,
        source=teacher if isinstance(teacher, BottleneckClassifier) else None,
        teacher_outputs=None if keys == "reused" else cached_outputs(run, teacher, inputs.texts),
    )
