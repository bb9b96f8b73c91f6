"""The encoders of finished runs, and bottlenecks on their embeddings, for `key_study.py` and `carried_keys.py`."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from kd.common.bottleneck.module import Decoder, DiscreteKeyValueBottleneck
from kd.common.bottleneck.training import CodeDataset, embed_samples, set_keys
from kd.common.methods import labels, labels_and_soft_targets
from kd.common.outputs import Outputs
from kd.common.reporting.results import RECIPE
from kd.common.training.arguments import KDTrainingArguments, Keys
from kd.common.training.inference import Collate, identity_collate
from kd.common.training.teacher_outputs import TeacherOutputs
from kd.common.training.trainer import KDTrainer
from kd.common.utils.devices import resolve_precision
from kd.common.utils.errors import UserError
from kd.nlp.data.loading import Texts, load_text_data
from kd.nlp.student_model.bottleneck_classifier import BottleneckClassifier
from kd.nlp.student_model.layers import cut_layers, load_encoder
from kd.nlp.teacher_model.teacher import load_classifier

GROUPS = 10  # groups of classes for training on one group after another


@dataclass(frozen=True)
class Setting:
    """How a student is trained.

    labels: maximum number of labelled texts per class that train the values; None for all.
    one_after_another: the classes arrive in groups, and the values train on one group at a time.
    """

    title: str
    decoder: Decoder = "linear"
    codebook_size: int = 512
    labels: int | None = None
    aligned: bool = True
    one_after_another: bool = False


class OnCodes(nn.Module):
    """A bottleneck as a model whose inputs are cached codes."""

    def __init__(self, bottleneck: DiscreteKeyValueBottleneck) -> None:
        super().__init__()
        self.bottleneck = bottleneck

    def forward(self, codes: Tensor) -> Outputs:
        return Outputs(logits=self.bottleneck.decode(codes))


@dataclass
class Embeddings:
    """Embeddings of the training and validation texts by one encoder."""

    train: Tensor
    validation: Tensor


def embed_rows(encoder: Any, rows: Any, collate: Collate) -> Tensor:
    """Mean hidden states (rows, width) of tokenized texts."""
    model = BottleneckClassifier.from_encoder(encoder, {0: "none"}, "mean", codebooks=1, codebook_size=1)
    return torch.stack(embed_samples(model, rows, collate, resolve_precision("auto")))


def embed(encoder: Any, texts: Texts) -> Embeddings:
    return Embeddings(*(embed_rows(encoder, rows, texts.collate) for rows in (texts.train, texts.validation)))


def teacher_encoder(folder: Path) -> str:
    """The teacher that a run fine-tuned, or that of its --teacher."""
    trained = folder / "stages" / "teacher_encoder"
    if trained.is_dir():
        return str(trained)
    return str(yaml.safe_load((folder / RECIPE).read_text(encoding="utf-8"))["teacher"])


@cache
def embedded(encoder: str, dataset: str, layers: int | None = None) -> tuple[Texts, Embeddings]:
    """The texts in a teacher's tokens, and their embeddings by the teacher or by a cut. Several runs may share it."""
    data = load_text_data(dataset)
    classifier = load_classifier(encoder, data)
    texts = Texts.of(data, classifier.tokenizer)
    return texts, embed(classifier.encoder if layers is None else cut_layers(classifier.encoder, layers), texts)


class KeyStudy:
    """The encoders of a run, and bottlenecks trained on their embeddings. `seed` is that of new keys."""

    def __init__(self, folder: Path, dataset: str, seed: int = 0) -> None:
        stages = folder / "stages"
        if not (folder / "results.json").exists():
            raise UserError(f"{folder} is not a finished run of distill_keys_carried.sh: pass such a run")
        if not (stages / "student_encoder").is_dir():
            raise UserError(f"{folder} has no aligned student: pass a run with --align_epochs above 0")
        self.texts, self.teacher = embedded(teacher_encoder(folder), dataset)
        self.data, self.seed = self.texts.data, seed
        self.encoder = load_encoder(stages / "student_encoder")
        _, unaligned = embedded(teacher_encoder(folder), dataset, self.encoder.config.num_hidden_layers)
        self.student = {True: embed(self.encoder, self.texts), False: unaligned}
        self.labels = torch.tensor(self.texts.train["labels"])
        self.teachers: dict[tuple[Decoder, int], tuple[DiscreteKeyValueBottleneck, TeacherOutputs]] = {}
        self.unused_folder = TemporaryDirectory()  # output_dir of the trainer, which saves nothing
        self.args = KDTrainingArguments(
            output_dir=self.unused_folder.name, eval_strategy="no", save_strategy="no", logging_strategy="no",
            report_to="none", disable_tqdm=True, precision="fp32", train_sampling_strategy="random",
            per_device_train_batch_size=256, num_train_epochs=10, learning_rate=3e-3, value_learning_rate=3e-2,
        )  # fmt: skip

    def accuracy(self, setting: Setting, keys: Keys) -> float:
        """Validation accuracy of a student with these keys."""
        student = self.student_bottleneck(setting, keys)
        with torch.no_grad():
            return self.validation_accuracy(student(self.student[setting.aligned].validation))

    def student_bottleneck(
        self, setting: Setting, keys: Keys, fitted_to: Tensor | None = None, seed: int | None = None
    ) -> DiscreteKeyValueBottleneck:
        """A student's trained bottleneck. New keys are fitted to embeddings (rows, width), by default of all training
        texts, and with the seed of the teacher's keys.
        """
        teacher, teacher_outputs = self.teacher_bottleneck(setting.decoder, setting.codebook_size)
        train = self.student[setting.aligned].train
        student = self.new_bottleneck(setting.decoder, setting.codebook_size)
        fitted_to = train if fitted_to is None else fitted_to
        set_keys(student, keys, teacher, fitted_to, self.seed if seed is None else seed)
        if keys == "reused":
            return student
        codes = student.encode(train)
        if setting.one_after_another:
            for classes in torch.arange(self.data.num_labels).tensor_split(GROUPS):
                self.fit_values(student, codes, torch.isin(self.labels, classes).nonzero().flatten(), None, "sgd")
        else:
            self.fit_values(student, codes, self.labelled(setting.labels), teacher_outputs)
        return student

    def linear_probe_one_after_another(self) -> float:
        """Validation accuracy of a linear layer trained on the same groups of classes, for comparison."""
        torch.manual_seed(0)
        probe = nn.Linear(self.teacher.train.shape[1], self.data.num_labels)
        for classes in torch.arange(self.data.num_labels).tensor_split(GROUPS):
            optimizer = torch.optim.SGD(probe.parameters(), lr=0.1)
            rows = torch.isin(self.labels, classes).nonzero().flatten()
            for _ in range(10):
                for batch in rows[torch.randperm(len(rows))].split(64):
                    loss = nn.functional.cross_entropy(probe(self.student[True].train[batch]), self.labels[batch])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
        return self.validation_accuracy(probe(self.student[True].validation))

    def new_bottleneck(self, decoder: Decoder, codebook_size: int) -> DiscreteKeyValueBottleneck:
        torch.manual_seed(0)
        width = self.teacher.train.shape[1]
        return DiscreteKeyValueBottleneck(width, self.data.num_labels, codebook_size=codebook_size, decoder=decoder)

    def teacher_bottleneck(
        self, decoder: Decoder, codebook_size: int
    ) -> tuple[DiscreteKeyValueBottleneck, TeacherOutputs]:
        """The teacher's bottleneck of this shape, trained on labels, and its logits of the training texts."""
        if (decoder, codebook_size) not in self.teachers:
            teacher = self.new_bottleneck(decoder, codebook_size)
            set_keys(teacher, "new", None, self.teacher.train, self.seed)
            codes = teacher.encode(self.teacher.train)
            self.fit_values(teacher, codes, torch.arange(len(codes)), None)
            with torch.no_grad():
                outputs = TeacherOutputs(torch.arange(len(codes)), teacher.decode(codes))
            self.teachers[decoder, codebook_size] = teacher, outputs
        return self.teachers[decoder, codebook_size]

    def fit_values(
        self,
        bottleneck: DiscreteKeyValueBottleneck,
        codes: Tensor,
        rows: Tensor,
        teacher_outputs: TeacherOutputs | None,
        optimizer: str = "adamw_torch",
    ) -> None:
        """Trains values and decoder on `rows` with labels and, unless it is None, the teacher's logits."""
        method = labels() if teacher_outputs is None else labels_and_soft_targets(0.5, 2.0)
        args = self.args
        args.optim, args.value_learning_rate = optimizer, 30.0 if optimizer == "sgd" else 3e-2
        args.num_train_epochs = 10 * max(1, len(codes) // len(rows) // 4) if optimizer != "sgd" else 10
        KDTrainer(
            model=OnCodes(bottleneck), args=args, objective=method.objective, teacher_outputs=teacher_outputs,
            train_dataset=CodeDataset(list(codes[rows]), self.labels[rows], rows), data_collator=identity_collate,
        ).train()  # fmt: skip

    def labelled(self, per_class: int | None) -> Tensor:
        """Training rows in random order, at most `per_class` of each class."""
        rows = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(0))
        if per_class is None:
            return rows
        return torch.cat([rows[self.labels[rows] == c][:per_class] for c in range(self.data.num_labels)])

    def validation_accuracy(self, logits: Tensor) -> float:
        return (logits.argmax(1) == torch.tensor(self.texts.validation["labels"])).float().mean().item()
