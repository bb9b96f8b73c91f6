"""A folder with the teacher's distributions over the next token, in a sparse form (`sparse_logits`).

It belongs to one teacher, one set of training tokens, one form and one temperature, which its file
`teacher_logits.json` identifies; it is refused for any other, and if it is damaged. Students and seeds share it, and a
killed run continues it: see `cache_outputs`. Distributions are looked up by sample id. Those of a sample belong to its
labels that are not IGNORED, in their order.
"""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kd.common.data.fingerprints import data_fingerprint, dataset_hash, model_fingerprint
from kd.common.methods import Method
from kd.common.outputs import Outputs
from kd.common.token_terms import TokenTerm
from kd.common.training.arguments import KDTrainingArguments
from kd.common.training.inference import Collate, column_array
from kd.common.training.teacher_outputs import TeacherOutputs, cache_outputs
from kd.common.utils.errors import UserError
from kd.common.utils.files import LOCK, FolderLock, lock_folder, read_json, write_json
from kd.common.utils.tasks import IGNORED
from kd.nlp.student_model.sparse_logits import Form, Top, form_of, spec_of
from kd.nlp.student_model.token_objective import TOKENS, temperature_of

FOLDER_FLAG = "--teacher_logits_folder"
DESCRIPTION = "teacher_logits.json"
SHARD_TOKENS = 2**17  # tokens in a shard; after a kill, the unfinished shard is computed again
POLL = 1.0  # seconds between attempts to lock a folder


class StoredLogits(TeacherOutputs):
    """Stored distributions by sample id. The features of a batch are their columns: those of the labels of all
    samples, one after another.
    """

    def batch(self, sample_ids: Tensor, positions: int | None = None, device: torch.device | None = None) -> Outputs:
        columns = {name: torch.cat(self.feature(name, sample_ids.cpu())) for name in self.features}
        columns["tokens"] = columns["tokens"].long()
        return Outputs(features={name: column.to(device) for name, column in columns.items()})


def with_sample_ids(rows: Dataset) -> Dataset:
    """Rows with their numbers as sample_id, unless they have that column."""
    if "sample_id" in rows.column_names:
        return rows
    return rows.add_column("sample_id", np.arange(len(rows))).with_format(rows.format["type"])


@dataclass(frozen=True)
class LogitStore:
    """The folder of the distributions of one teacher for one set of training rows, in `form` and at `temperature`. The
    teacher runs in `precision`.
    """

    folder: Path
    form: Form
    temperature: float
    precision: str

    @classmethod
    def of(cls, args: Any, training: KDTrainingArguments, divergence: str, folder: Path) -> "LogitStore":
        """The folder of --teacher_logits_folder, by default `folder`. `divergence` is the forward one, as
        `divergence_of` takes it. Raises UserError for an invalid form.
        """
        form, folder = form_of(args.teacher_logits), Path(args.teacher_logits_folder or folder)
        return cls(folder, form, temperature_of(divergence, training.temperature), training.precision)

    def check(self, **parts: Any) -> dict[str, Any]:
        """The description of the content with `parts`, such as the teacher, as far as they are known.

        Raises UserError if the folder has another content.
        """
        wanted = {"form": spec_of(self.form), "temperature": self.temperature, "precision": self.precision, **parts}
        path = self.folder / DESCRIPTION
        if path.exists():
            found = _read_description(path)
            differences = [_difference(name, found.get(name), value) for name, value in wanted.items()]
            if changed := " and ".join(filter(None, differences)):
                raise UserError(
                    f"{self.folder} has teacher logits of another {changed}: pass the same again, or another folder "
                    f"as {FOLDER_FLAG}"
                )
        elif self.folder.exists() and any(file.name != LOCK for file in self.folder.iterdir()):
            raise UserError(f"{self.folder} is not empty and has no {DESCRIPTION}: pass another {FOLDER_FLAG}")
        return wanted

    def check_tokens(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> dict[str, Any]:
        """As `check`, with the tokenizer. Raises UserError also if the form needs more than the whole vocabulary."""
        if isinstance(self.form, Top) and self.form.k > vocabulary:
            raise UserError(f"--teacher_logits top:k={self.form.k} is more than the vocabulary: pass k={vocabulary}")
        return self.check(tokenizer=model_fingerprint(tokenizer))

    def open(
        self,
        teacher: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Dataset,
        collate: Collate,
        batch_size: int,
    ) -> StoredLogits:
        """Computes and stores what is missing. `rows` have the columns sample_id, labels and length, and `collate`
        makes batches of them, with sample_id and labels.

        Raises UserError as `check_tokens` does, and if a stored file is damaged.
        """
        tokens = dataset_hash(rows.rename_column("labels", "targets"))  # a column of labels would be left out
        parts = self.check_tokens(tokenizer, teacher.config.vocab_size)
        description = self.check(**parts, **{"training data": tokens}, teacher=model_fingerprint(teacher))
        lock = self._lock(description) if PartialState().is_main_process else None
        outputs = cache_outputs(
            teacher,
            partial(self._compress, teacher),
            rows,
            lambda features: _with_targets(collate(features)),
            self.folder,
            data_fingerprint([description]),
            self.precision,
            batch_size,
            shard_rows=max(1, SHARD_TOKENS // int(column_array(rows, "length").max())),
            refuse_damaged=True,
        )
        del lock
        return StoredLogits(outputs.sample_ids, features=outputs.features)

    def replace_term(self, method: Method) -> Method:
        """The method with the forward divergence from `StoredLogits` in place of that from logits."""

        def rows_at_labels(teacher: Outputs | None, labels: Tensor | None) -> list[Tensor]:
            """(batch, positions, ...), zeros where the label is IGNORED."""
            assert teacher is not None and teacher.features is not None and labels is not None
            found, labelled = self.form.rows(teacher.features), labels != IGNORED
            if len(found[0]) != labelled.sum():
                raise ValueError(f"{len(found[0])} stored distributions do not fit {labelled.sum()} labels")
            spread = [rows.new_zeros(*labels.shape, *rows.shape[1:]) for rows in found]
            return [zeros.index_put((labelled,), rows) for zeros, rows in zip(spread, found, strict=True)]

        weight, term = method.terms[TOKENS]
        assert isinstance(term, TokenTerm)
        loss = partial(self.form.loss, temperature=self.temperature)
        return Method(method.terms | {TOKENS: (weight, TokenTerm(loss, rows_at_labels, term.weights))})

    def _lock(self, description: dict[str, Any]) -> FolderLock:
        """Locks the folder, as soon as no other run is filling it, and writes its description."""
        self.folder.mkdir(parents=True, exist_ok=True)
        announced = False
        while True:
            try:
                lock = lock_folder(self.folder)
            except UserError as error:
                if not announced:
                    print(f"waiting: {str(error).partition(':')[0]}", flush=True)
                announced = True
                time.sleep(POLL)
                continue
            self.check(**description)  # another run may have filled it in the meantime
            if not (self.folder / DESCRIPTION).exists():
                write_json(self.folder / DESCRIPTION, description)
            return lock

    def _compress(
        self, teacher: PreTrainedModel, targets: Tensor, ids: Tensor, **inputs: Tensor
    ) -> dict[str, list[Tensor]]:
        """The columns of each sample of a batch. They are computed without autocast, which refuses fp16 on CPUs."""
        logits = teacher(**inputs).logits
        samples = zip(logits, targets != IGNORED, ids.tolist(), strict=True)
        with torch.autocast(logits.device.type, enabled=False):
            found = [self.form.compress(row[keep], self.temperature, sample) for row, keep, sample in samples]
        return {name: [columns[name] for columns in found] for name in found[0]}


def check_stored_logits(args: Any, training: KDTrainingArguments, divergence: str) -> None:
    """Raises UserError for an invalid --teacher_logits, or a --teacher_logits_folder of another form."""
    if args.teacher_logits is None:
        return
    store = LogitStore.of(args, training, divergence, Path())
    if args.teacher_logits_folder is not None:
        store.check()


def _with_targets(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Adds labels and sample ids under names that are passed to `_compress`."""
    return batch | {"targets": batch["labels"], "ids": batch["sample_id"]}


def _read_description(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except UserError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: remove {path.parent}, or pass another {FOLDER_FLAG}")
    return found


def _difference(name: str, found: Any, wanted: Any) -> str | None:
    """The name of a part that differs, with its values unless they are hashes."""
    if found == wanted:
        return None
    return f"{name} ({found}, not {wanted})" if name in ("form", "temperature", "precision") else name
