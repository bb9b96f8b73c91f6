"""The steps that every text distillation is made of: fine-tune, listen to the teacher, align, fill a bottleneck."""

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.filling import Keys, set_keys
from common.inference import as_it_is, over_dataset
from common.losses import feature_cosine, feature_l2
from common.objective import FeatureLoss, Hint, Objective, Term, labels_and_soft_targets, match, task_loss
from common.outputs import Outputs
from common.run import TrainerRun
from common.teacher_outputs import TeacherOutputs, outputs_key
from common.utils.devices import best_device, process
from nlp.data.loading import TextData
from nlp.data.tokenized import Collator, tokenize
from nlp.student_model.bottleneck_classifier import BottleneckClassifier, Pooling, pool
from nlp.student_model.evaluation import trainer_metrics
from nlp.student_model.fill import FIT_TEXTS, code_dataset, embed_texts, encode_texts
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

    run: TrainerRun
    pooling: Pooling
    bottleneck: dict[str, Any]
    value_epochs: float
    value_batch_size: int

    @property
    def precision(self) -> str:
        return self.run.args.precision

    def objective(self, data: TextData, with_teacher: bool) -> Objective:
        """alpha * labels + (1 - alpha) * soft targets, or the labels alone."""
        args = self.run.args
        if not with_teacher:
            return Objective(task=(1.0, task_loss(data.regression)))
        return labels_and_soft_targets(args.alpha, args.temperature, data.regression)

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
        """Trains a classifier end to end, on labels alone or with a teacher's logits (then without dropout)."""
        if teacher_outputs is not None:
            switch_off_dropout(model)
        model.requires_grad_(True)
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
        same relative depth, without dropout, which would only blur what is to be matched.
        """
        own, target = layer_paths(encoder), layer_paths(teacher)
        layers = uniform_map(len(own), len(target))
        switch_off_dropout(encoder)
        for part in (encoder.get_input_embeddings(), getattr(encoder, "pooler", None)):
            if part is not None:
                part.requires_grad_(False)  # copied from the teacher, or without a say in the hidden states
        width, teacher_width = encoder.config.hidden_size, teacher.config.hidden_size
        if sum(texts.train["length"]) * len(layers) * teacher_width * 2 <= FEATURE_BYTES:
            source: dict[str, Any] = {"teacher_outputs": self.listen(teacher, texts, layers)}
        else:
            source = {"teacher": teacher, "teacher_features": {f"layer_{i}": target[i] for i in layers}}
        return self.run.train(
            name,
            encoder,
            {"num_train_epochs": epochs, "learning_rate": rate},
            objective=alignment(layers, width, teacher_width, self.pooling),
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
        model = BottleneckClassifier.around(encoder, labels, self.pooling, **self.bottleneck).to(best_device())
        seed = self.run.args.seed
        sample = (
            texts.train.shuffle(seed=seed).select(range(FIT_TEXTS)) if len(texts.train) > FIT_TEXTS else texts.train
        )
        embeddings = embed_texts(model, sample, texts.collate, self.precision)
        rows = torch.cat([e.view(-1, e.shape[-1]) for e in embeddings]).to(model.device)
        model.config.key_statistics = set_keys(
            model.bottleneck, keys, source.bottleneck if source else None, rows, seed
        )
        if keys == "reused":
            return model
        if embeddings[0].dim() == 1 and len(embeddings) == len(texts.train):  # one vector a text, none left out
            codes = list(model.bottleneck.encode(rows).to(torch.uint16).cpu())
        else:
            codes = encode_texts(model, texts.train, texts.collate, self.precision)
        rate = self.run.args.value_learning_rate or self.run.args.learning_rate
        validation_codes = encode_texts(model, texts.validation, texts.collate, self.precision)
        return self.run.train(
            name,
            model,
            {
                "num_train_epochs": self.value_epochs,
                "learning_rate": rate / 10,  # of the decoder, which every text moves; a value waits for its key
                "value_learning_rate": rate,
                "per_device_train_batch_size": self.value_batch_size,
                "train_sampling_strategy": "random",
            },
            objective=self.objective(texts.data, teacher_outputs is not None),
            teacher_outputs=teacher_outputs,
            train_dataset=code_dataset(codes, texts.train),
            eval_dataset=code_dataset(validation_codes, texts.validation),
            data_collator=as_it_is,
            compute_metrics=trainer_metrics(texts.data),
        )


def switch_off_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def alignment(layers: list[int], width: int, teacher_width: int, pooling: Pooling) -> Objective:
    """L2 + cosine between `student_i` and the teacher's `layer_{layers[i]}`, averaged over layers, and between what is
    pooled from the last of them, which is what a bottleneck or a head sees. Through linear regressors, and without
    the pooled terms, where the widths differ.
    """
    terms: dict[str, tuple[float, Term]] = {}
    for loss_name, loss in (("l2", feature_l2), ("cosine", feature_cosine)):
        for i, layer in enumerate(layers):
            own, target = f"student_{i}", f"layer_{layer}"
            same = width == teacher_width
            term: Term = match(own, loss, target) if same else Hint(own, loss, width, teacher_width, target)
            terms[f"{loss_name}_{i}"] = (1 / len(layers), term)
        if width == teacher_width and pooling != "tokens":
            last = len(layers) - 1
            terms[f"{loss_name}_pooled"] = (
                1.0,
                match_pooled(f"student_{last}", f"layer_{layers[last]}", pooling, loss),
            )
    return Objective(**terms)


def match_pooled(name: str, teacher_name: str, pooling: Pooling, loss: FeatureLoss) -> Term:
    """A feature loss between pooled hidden states."""

    def term(student: Outputs, teacher: Outputs | None, labels: torch.Tensor | None) -> torch.Tensor:
        if teacher is None or not student.features or not teacher.features or student.mask is None:
            raise ValueError("pooled hidden states need features of student and teacher, and an attention mask")
        own, target = student.features[name].float(), teacher.features[teacher_name].float()
        return loss(pool(own, student.mask, pooling), pool(target, student.mask, pooling))

    return term
