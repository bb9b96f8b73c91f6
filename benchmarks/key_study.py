"""Accuracy of a student's bottleneck with carried, new, random and reused keys, in several settings.

    python benchmarks/key_study.py runs/NLP/keys_carried_seed* --dataset clinc_oos --markdown keys.md

Reads finished runs of distill_keys_carried.sh on one dataset, one per seed. Their encoders, with and without
alignment, embed the texts once. Then only the values are trained for each combination of setting and keys, which takes
seconds. The table contains the mean and standard deviation of the student's validation accuracy over the runs.
"""

import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import torch
from torch import Tensor, nn
from tqdm import tqdm

from kd.common.bottleneck.module import Decoder, DiscreteKeyValueBottleneck
from kd.common.bottleneck.training import CodeDataset, embed_samples, set_keys
from kd.common.cli import Parser, run
from kd.common.methods import labels, labels_and_soft_targets
from kd.common.outputs import Outputs
from kd.common.training.arguments import KDTrainingArguments, Keys
from kd.common.training.inference import identity_collate
from kd.common.training.teacher_outputs import TeacherOutputs
from kd.common.training.trainer import KDTrainer
from kd.common.utils.devices import resolve_precision
from kd.common.utils.errors import UserError
from kd.common.utils.files import write_text
from kd.nlp.data.loading import Texts, load_text_data
from kd.nlp.student_model.bottleneck_classifier import BottleneckClassifier
from kd.nlp.student_model.layers import cut_layers, load_encoder
from kd.nlp.teacher_model.teacher import load_classifier

KEYS = get_args(Keys)
GROUPS = 10  # groups of classes for training on one group after another


@dataclass(frozen=True)
class Setting:
    """A row of the table.

    labels: maximum number of labelled texts per class that train the values; None for all.
    one_after_another: the classes arrive in groups, and the values train on one group at a time.
    """

    title: str
    decoder: Decoder = "linear"
    codebook_size: int = 512
    labels: int | None = None
    aligned: bool = True
    one_after_another: bool = False


SETTINGS = [
    Setting("all labels, linear decoder, K = 512"),
    Setting("all labels, mean decoder, K = 512", "mean"),
    Setting("linear decoder, K = 64", codebook_size=64),
    Setting("linear decoder, K = 16", codebook_size=16),
    Setting("mean decoder, K = 16", "mean", codebook_size=16),
    Setting("20 labels per class, linear decoder", labels=20),
    Setting("5 labels per class, linear decoder", labels=5),
    Setting("5 labels per class, mean decoder", "mean", labels=5),
    Setting("no alignment, linear decoder", aligned=False),
    Setting("no alignment, 5 labels per class, mean decoder", "mean", labels=5, aligned=False),
    Setting("classes in 10 groups, one after another, mean decoder", "mean", one_after_another=True),
]


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="Folders of finished runs of distill_keys_carried.sh.")
    parser.add_argument("--dataset", required=True, help="Dataset of the runs.")
    parser.add_argument("--markdown", type=Path, help="File to which the table is also written.")
    args = parser.parse_args()
    accuracies: dict[tuple[str, str], list[float]] = defaultdict(list)
    probes = []
    for folder in args.runs:
        study = KeyStudy(folder, args.dataset)
        probes.append(study.linear_probe_one_after_another())
        for setting in tqdm(SETTINGS, desc=str(folder)):
            for keys in KEYS:
                if keys != "reused" or (setting.labels is None and not setting.one_after_another):
                    accuracies[setting.title, keys].append(study.accuracy(setting, keys))
    table = [
        f"| validation accuracy, {len(args.runs)} runs | " + " | ".join(KEYS) + " |",
        "|---|" + "---|" * len(KEYS),
    ]
    for setting in SETTINGS:
        row = [mean_and_deviation(accuracies[setting.title, keys]) for keys in KEYS]
        table.append(f"| {setting.title} | " + " | ".join(row) + " |")
    table.append(f"\nLinear probe, classes in {GROUPS} groups one after another: {mean_and_deviation(probes)}.")
    if args.markdown:
        write_text(args.markdown, "\n".join(table) + "\n")
    print("\n".join(table))


def mean_and_deviation(values: list[float]) -> str:
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean


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


def embed(encoder: Any, texts: Texts) -> Embeddings:
    model = BottleneckClassifier.from_encoder(encoder, {0: "none"}, "mean", codebooks=1, codebook_size=1)
    precision = resolve_precision("auto")
    splits = texts.train, texts.validation
    return Embeddings(*(torch.stack(embed_samples(model, rows, texts.collate, precision)) for rows in splits))


class KeyStudy:
    """The encoders of a run, and bottlenecks trained on their embeddings."""

    def __init__(self, folder: Path, dataset: str) -> None:
        self.data = load_text_data(dataset)
        stages = folder / "stages"
        if not (folder / "results.json").exists():
            raise UserError(f"{folder} is not a finished run of distill_keys_carried.sh: pass such a run")
        if not (stages / "student_encoder").is_dir():
            raise UserError(f"{folder} has no aligned student: pass a run with --align_epochs above 0")
        classifier = load_classifier(str(stages / "teacher_encoder"), self.data)
        self.texts = Texts.of(self.data, classifier.tokenizer)
        aligned = load_encoder(stages / "student_encoder")
        unaligned = cut_layers(classifier.encoder, aligned.config.num_hidden_layers)
        self.teacher = embed(classifier.encoder, self.texts)
        self.student = {True: embed(aligned, self.texts), False: embed(unaligned, self.texts)}
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
        teacher, teacher_outputs = self.teacher_bottleneck(setting.decoder, setting.codebook_size)
        embeddings = self.student[setting.aligned]
        student = self.new_bottleneck(setting.decoder, setting.codebook_size)
        set_keys(student, keys, teacher, embeddings.train, seed=0)
        if keys != "reused":
            codes = student.encode(embeddings.train)
            if setting.one_after_another:
                for classes in torch.arange(self.data.num_labels).tensor_split(GROUPS):
                    self.fit_values(student, codes, torch.isin(self.labels, classes).nonzero().flatten(), None, "sgd")
            else:
                self.fit_values(student, codes, self.labelled(setting.labels), teacher_outputs)
        with torch.no_grad():
            return self.validation_accuracy(student(embeddings.validation))

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
            set_keys(teacher, "new", None, self.teacher.train, seed=0)
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


if __name__ == "__main__":
    run(main)
