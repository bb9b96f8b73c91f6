"""Training the bottleneck behind a frozen text encoder: keys on its embeddings, values on the codes of its texts."""

from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from kd.common.bottleneck.codes import CodeDataset, Keys, set_keys
from kd.common.training.inference import Collate, identity_collate, run_inference
from kd.common.training.run import TrainerRun
from kd.common.training.teacher_outputs import TeacherOutputs
from kd.common.utils.devices import best_device
from kd.nlp.data.tokenized import Texts
from kd.nlp.student_model.arguments import BottleneckArguments, PairArguments
from kd.nlp.student_model.bottleneck_classifier import BottleneckClassifier
from kd.nlp.student_model.evaluation import trainer_metrics
from kd.nlp.student_model.inputs import Inputs
from kd.nlp.student_model.methods import labels_and_logits, labels_only
from kd.nlp.student_model.training import (
    align,
    load_or_train_teacher,
    read_stage,
    student_from,
    teacher_logits,
    train_control,
)
from kd.nlp.teacher_model.teacher import encoder_of

FIT_TEXTS = 20_000  # keys are fitted on the embeddings of at most so many texts


def code_dataset(codes: list[Tensor], tokens: Dataset) -> CodeDataset:
    return CodeDataset(codes, torch.tensor(tokens["labels"]), torch.tensor(tokens["sample_id"]))


def embed_texts(model: BottleneckClassifier, texts: Dataset, collate: Collate, precision: str) -> list[Tensor]:
    """The frozen encoder's embedding of each text: (hidden,), or (positions, hidden) with `tokens` pooling."""

    def embed(**batch: Tensor) -> dict[str, Tensor]:
        return {"embedding": model.embed(**batch)}

    return run_inference(model, embed, texts, collate, precision, description="embedding")["embedding"]


def encode_texts(model: BottleneckClassifier, texts: Dataset, collate: Collate, precision: str) -> list[Tensor]:
    """The codes of each text, uint16, under the frozen encoder and keys."""

    def encode(**batch: Tensor) -> dict[str, Tensor]:
        return {"codes": model.bottleneck.encode(model.embed(**batch)).to(torch.uint16)}

    return run_inference(model, encode, texts, collate, precision, description="encoding")["codes"]


def train_bottleneck(
    run: TrainerRun,
    name: str,
    encoder: PreTrainedModel,
    texts: Texts,
    bottleneck: BottleneckArguments,
    keys: Keys,
    *,
    source: BottleneckClassifier | None = None,
    teacher_outputs: TeacherOutputs | None = None,
    folder: Path | None = None,
) -> PreTrainedModel:
    """The stage `name`: a bottleneck behind a frozen encoder. Sets its keys (see `set_keys`), then trains its values
    on cached codes, by labels and the teacher's logits, unless they are reused with the keys of `source`.
    """

    def train() -> PreTrainedModel:
        precision, seed = run.args.precision, run.args.seed
        labels = dict(enumerate(texts.data.label_names)) or {0: "LABEL_0"}
        model = BottleneckClassifier.around(encoder, labels, bottleneck.pooling, **bottleneck.shape())
        model.to(best_device())
        sample = (
            texts.train.shuffle(seed=seed).select(range(FIT_TEXTS)) if len(texts.train) > FIT_TEXTS else texts.train
        )
        embeddings = embed_texts(model, sample, texts.collate, precision)
        rows = torch.cat([e.view(-1, e.shape[-1]) for e in embeddings]).to(model.device)
        teacher = source.bottleneck if source else None
        model.config.key_statistics = set_keys(model.bottleneck, keys, teacher, rows, seed)
        if keys == "reused":
            return model
        if embeddings[0].dim() == 1 and len(embeddings) == len(texts.train):  # one vector a text, none left out
            codes = list(model.bottleneck.encode(rows).to(torch.uint16).cpu())
        else:
            codes = encode_texts(model, texts.train, texts.collate, precision)
        validation_codes = encode_texts(model, texts.validation, texts.collate, precision)
        return train_values(
            run, name, model, texts, bottleneck, codes, validation_codes, teacher_outputs=teacher_outputs
        )

    return run.stage(name, train, read_stage, texts.collate.tokenizer, folder)


def train_values(
    run: TrainerRun,
    name: str,
    model: BottleneckClassifier,
    texts: Texts,
    bottleneck: BottleneckArguments,
    codes: list[Tensor],
    validation_codes: list[Tensor],
    teacher_outputs: TeacherOutputs | None,
) -> BottleneckClassifier:
    """Trains values and decoder on the codes of the texts."""
    rate = run.args.value_learning_rate or run.args.learning_rate
    method = labels_only if teacher_outputs is None else labels_and_logits
    return run.train(
        name,
        model,
        {
            "num_train_epochs": bottleneck.value_epochs,
            "learning_rate": rate / 10,  # of the decoder, which every text moves; a value waits for its key
            "value_learning_rate": rate,
            "per_device_train_batch_size": bottleneck.value_batch_size,
            "train_sampling_strategy": "random",
        },
        objective=method(texts.data, run.args).objective,
        teacher_outputs=teacher_outputs,
        train_dataset=code_dataset(codes, texts.train),
        eval_dataset=code_dataset(validation_codes, texts.validation),
        data_collator=identity_collate,
        compute_metrics=trainer_metrics(texts.data),
    )


# ---- teacher, control and student ----


def train_bottleneck_teacher(
    run: TrainerRun, inputs: Inputs, pair: PairArguments, bottleneck: BottleneckArguments, folder: Path | None = None
) -> PreTrainedModel:
    """A fine-tuned classifier, whose head a bottleneck replaces where the system has the teacher have one."""
    classifier = (
        inputs.teacher.model
        if bottleneck.freeze_teacher_encoder
        else load_or_train_teacher(run, inputs, pair, "teacher_encoder", folder)
    )
    if bottleneck.bottleneck == "student" or isinstance(classifier, BottleneckClassifier):
        return classifier
    return train_bottleneck(run, "teacher", encoder_of(classifier), inputs.texts, bottleneck, "new", folder=folder)


def train_bottleneck_control(
    run: TrainerRun,
    inputs: Inputs,
    pair: PairArguments,
    bottleneck: BottleneckArguments,
    encoder_epochs: float | None = None,
    folder: Path | None = None,
) -> PreTrainedModel:
    """A bottleneck behind the student's encoder, both trained on labels alone; the encoder by default for as many
    epochs as the student's is aligned.
    """
    epochs = pair.align_epochs if encoder_epochs is None else encoder_epochs
    classifier = train_control(run, inputs, pair, epochs, "control_encoder", folder)
    encoder = encoder_of(classifier)
    return train_bottleneck(run, "control", encoder, inputs.student_texts, bottleneck, "new", folder=folder)


def train_bottleneck_student(
    run: TrainerRun,
    inputs: Inputs,
    pair: PairArguments,
    bottleneck: BottleneckArguments,
    teacher: PreTrainedModel,
    folder: Path | None = None,
) -> PreTrainedModel:
    """The student: its encoder aligned with the teacher's, then its values trained on labels and the teacher's logits.
    `folder`: where runs of other systems find the aligned encoder and the teacher's outputs.
    """
    keys = bottleneck.keys
    encoder = align(run, encoder_of(student_from(inputs, encoder_of(teacher))), teacher, inputs, pair,
                    bottleneck.pooling, folder)  # fmt: skip
    return train_bottleneck(
        run,
        "student",
        encoder,
        inputs.student_texts,
        bottleneck,
        keys,
        source=teacher if isinstance(teacher, BottleneckClassifier) else None,
        teacher_outputs=None if keys == "reused" else teacher_logits(run, teacher, inputs.texts, folder),
    )
