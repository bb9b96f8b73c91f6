"""The steps that every text distillation is made of: fine-tune, listen to the teacher, align, fill a bottleneck."""

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.inference import over_dataset
from common.losses import feature_cosine, feature_l2
from common.objective import Hint, Objective, Term, match, soft_targets, task_loss
from common.run import Run
from common.teacher_outputs import TeacherOutputs, outputs_key
from common.utils.devices import process
from nlp.data.loading import TextData
from nlp.data.tokenized import Collator, tokenize
from nlp.student_model.bottleneck_classifier import BottleneckClassifier
from nlp.student_model.evaluation import trainer_metrics
from nlp.student_model.fill import Keys, as_it_is, encode_texts, prepare_keys
from nlp.student_model.layers import layer_paths, uniform_map

FEATURE_BYTES = 4 * 2**30  # above this the hidden states of a teacher are recomputed each epoch, not cached


@dataclass
class Texts:
    """A dataset in the tokens of one tokenizer."""

    data: TextData
    splits: dict[str, Dataset]
    collate: Collator

    @classmethod
    def of(cls, data: TextData, tokenizer: PreTrainedTokenizerBase) -> "Texts":
        return cls(data, tokenize(data, tokenizer), Collator(tokenizer))

    @property
    def train(self) -> Dataset:
        return self.splits["train"]

    @property
    def validation(self) -> Dataset:
        return next(rows for name, rows in self.splits.items() if name.startswith("validation"))


@dataclass
class Pipeline:
    """The steps, as stages of one run. `value_epochs` and `value_batch_size` are for the values of a bottleneck."""

    run: Run
    pooling: Any
    bottleneck: dict[str, Any]
    value_epochs: float
    value_batch_size: int

    @property
    def precision(self) -> str:
        return self.run.args.precision

    def objective(self, data: TextData, with_teacher: bool) -> Objective:
        """alpha * labels + (1 - alpha) * soft targets, or the labels alone."""
        args = self.run.args
        task = task_loss(data.regression)
        if not with_teacher:
            return Objective(task=(1.0, task))
        soft = soft_targets(args.temperature, data.regression)
        return Objective(task=(args.alpha, task), soft_targets=(1 - args.alpha, soft))

    def finetune(
        self,
        name: str,
        model: PreTrainedModel,
        texts: Texts,
        epochs: float,
        rate: float,
        teacher_outputs: TeacherOutputs | None = None,
        freeze_embeddings: bool = True,
    ) -> PreTrainedModel:
        """Trains a classifier end to end, on labels alone or with a teacher's logits."""
        model.get_input_embeddings().requires_grad_(not freeze_embeddings)
        return self.run.train(
            name,
            model,
            {"num_train_epochs": epochs, "learning_rate": rate},
            objective=self.objective(texts.data, teacher_outputs is not None),
            teacher_outputs=teacher_outputs,
            train_dataset=texts.train,
            eval_dataset=texts.validation,
            data_collator=texts.collate,
            compute_metrics=trainer_metrics(texts.data),
        )

    def listen(self, teacher: PreTrainedModel, texts: Texts, layers: list[int] | None = None) -> TeacherOutputs:
        """The teacher's logits for the training texts, or the hidden states of some of its layers (from 0)."""

        def logits(**batch: Any) -> dict[str, torch.Tensor]:
            return {"logits": teacher(**batch).logits.float()}

        def hidden(**batch: Any) -> dict[str, torch.Tensor]:
            states = teacher(**batch, output_hidden_states=True).hidden_states  # embeddings first
            return {f"layer_{i}": states[i + 1].half() for i in layers or []}

        def compute() -> TeacherOutputs:
            call = logits if layers is None else hidden
            said = over_dataset(teacher, call, texts.train, texts.collate, self.precision, description="teacher")
            ids = torch.tensor(texts.train["sample_id"])
            if layers is None:
                return TeacherOutputs(ids, torch.stack(said["logits"]))
            lengths = torch.tensor([len(states) for states in next(iter(said.values()))])
            return TeacherOutputs(ids, features={n: torch.cat(s) for n, s in said.items()}, lengths=lengths)

        key = outputs_key(teacher, texts.data.fingerprint, texts.train["input_ids"], self.precision, layers)
        folder = self.run.folder / "teacher_outputs"
        with self.run.timed("teacher_outputs"):
            return TeacherOutputs.load_or_compute(folder, key, compute, write=process()[0] == 0)

    def align(
        self, name: str, encoder: PreTrainedModel, teacher: PreTrainedModel, texts: Texts, epochs: float, rate: float
    ) -> PreTrainedModel:
        """Trains a student encoder, on texts without labels, to have the hidden states of the teacher's layers at the
        same relative depth: L2 + cosine, through linear regressors where the widths differ.
        """
        own, target = layer_paths(encoder), layer_paths(teacher)
        layers = uniform_map(len(own), len(target))
        width, teacher_width = encoder.config.hidden_size, teacher.config.hidden_size
        terms: dict[str, tuple[float, Term]] = {}
        for i, layer in enumerate(layers):
            for loss_name, loss in (("l2", feature_l2), ("cosine", feature_cosine)):
                names = (f"student_{i}", f"layer_{layer}")
                if width == teacher_width:
                    terms[f"{loss_name}_{i}"] = (1 / len(layers), match(names[0], loss, names[1]))
                else:
                    hint = Hint(names[0], loss, width, teacher_width, names[1])
                    terms[f"{loss_name}_{i}"] = (1 / len(layers), hint)
        encoder.get_input_embeddings().requires_grad_(False)
        positions = sum(texts.train["length"])
        if positions * len(layers) * teacher_width * 2 <= FEATURE_BYTES:
            source: dict[str, Any] = {"teacher_outputs": self.listen(teacher, texts, layers)}
        else:
            source = {"teacher": teacher, "teacher_features": {f"layer_{i}": target[i] for i in layers}}
        return self.run.train(
            name,
            encoder,
            {"num_train_epochs": epochs, "learning_rate": rate},
            objective=Objective(**terms),
            features={f"student_{i}": path for i, path in enumerate(own)},
            train_dataset=texts.train.remove_columns("labels"),
            data_collator=texts.collate,
            **source,
        )

    def fill(
        self,
        name: str,
        encoder: PreTrainedModel,
        texts: Texts,
        keys: Keys,
        source: BottleneckClassifier | None = None,
        teacher_outputs: TeacherOutputs | None = None,
    ) -> BottleneckClassifier:
        """A bottleneck behind a frozen encoder: keys, then (but for `reused`) values on cached codes."""
        labels = dict(enumerate(texts.data.label_names)) or {0: "LABEL_0"}
        model = BottleneckClassifier.around(encoder, labels, self.pooling, **self.bottleneck)
        seed = self.run.args.seed
        model.config.key_statistics = prepare_keys(
            model, keys, source, texts.train, texts.collate, self.precision, seed
        )
        if keys == "reused":
            return model
        codes = {split: encode_texts(model, rows, texts.collate, self.precision) for split, rows in
                 (("train", texts.train), ("validation", texts.validation))}  # fmt: skip
        return self.run.train(
            name,
            model,
            {
                "num_train_epochs": self.value_epochs,
                "learning_rate": self.run.args.value_learning_rate or self.run.args.learning_rate,
                "per_device_train_batch_size": self.value_batch_size,
                "train_sampling_strategy": "random",
            },
            objective=self.objective(texts.data, teacher_outputs is not None),
            teacher_outputs=teacher_outputs,
            train_dataset=codes["train"],
            eval_dataset=codes["validation"],
            data_collator=as_it_is,
            compute_metrics=trainer_metrics(texts.data),
        )
