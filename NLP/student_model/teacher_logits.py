"""A folder with the teacher's distributions over the next token, in a sparse form (`sparse_logits`).

It belongs to one teacher, one set of training tokens, one form and one temperature, which its file
`teacher_logits.json` identifies; it is refused for any other, and if it is damaged. Students and seeds share it, and a
killed run continues it: see `cache_outputs`. Distributions are looked up by sample id. Those of a sample belong to its
labels that are not IGNORED, in their order.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kd.common.data.fingerprints import data_fingerprint, dataset_hash, model_fingerprint
from kd.common.objective import Term
from kd.common.outputs import Outputs
from kd.common.training.inference import Collate, column_array
from kd.common.training.teacher_outputs import TeacherOutputs, cache_outputs
from kd.common.utils.errors import UserError
from kd.common.utils.files import LOCK, FolderLock, lock_folder, read_json, write_json
from kd.common.utils.tasks import IGNORED
from kd.nlp.student_model.sparse_logits import Form, Top, spec_of

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


def stored_term(form: Form, temperature: float) -> Term:
    """The forward KL from `StoredLogits`: the mean over the labels that are not IGNORED."""

    def term(student: Outputs, teacher: Outputs | None, labels: Tensor | None) -> Tensor:
        assert student.logits is not None and labels is not None
        assert teacher is not None and teacher.features is not None
        logits = student.logits[labels != IGNORED]
        return form.loss(logits, teacher.features, temperature) if len(logits) else student.logits.sum() * 0.0

    return term


def with_sample_ids(rows: Dataset) -> Dataset:
    """Rows with their numbers as sample_id, unless they have that column."""
    if "sample_id" in rows.column_names:
        return rows
    return rows.add_column("sample_id", np.arange(len(rows))).with_format(rows.format["type"])


@dataclass(frozen=True)
class LogitStore:
    """The folder of the distributions of one teacher for one set of training rows, in `form` and at `temperature`.
    The teacher runs in `precision`; `tokenizer` is that of the rows.
    """

    folder: Path
    form: Form
    temperature: float
    precision: str
    tokenizer: PreTrainedTokenizerBase

    def check(self, vocabulary: int, **parts: str) -> dict[str, Any]:
        """The description of the content, with further `parts` by name, such as the teacher.

        Raises UserError if the folder has another content, and if the form needs more tokens than there are.
        """
        if isinstance(self.form, Top) and self.form.k > vocabulary:
            raise UserError(f"--teacher_logits top:k={self.form.k} needs k of at most {vocabulary}, the vocabulary")
        wanted = {"form": spec_of(self.form), "temperature": self.temperature, "precision": self.precision}
        wanted |= {"tokenizer": model_fingerprint(self.tokenizer), **parts}
        path = self.folder / DESCRIPTION
        if path.exists():
            found = _read_description(path)
            changed = [_difference(name, found.get(name), value) for name, value in wanted.items()]
            if any(changed):
                raise UserError(
                    f"{self.folder} has teacher logits of another {' and '.join(filter(None, changed))}: restore it, "
                    f"or pass another {FOLDER_FLAG}"
                )
        elif self.folder.exists() and any(file.name != LOCK for file in self.folder.iterdir()):
            raise UserError(f"{self.folder} is not empty and has no {DESCRIPTION}: pass another {FOLDER_FLAG}")
        return wanted

    def open(self, teacher: PreTrainedModel, rows: Dataset, collate: Collate, batch_size: int) -> StoredLogits:
        """Computes and stores what is missing. `rows` have the columns sample_id, labels and length, and `collate`
        makes batches of them, with sample_id and labels.

        Raises UserError as `check` does, and if a stored file is damaged.
        """
        data = dataset_hash(rows.rename_column("labels", "targets"))  # which it would leave out
        description = self.check(
            teacher.config.vocab_size, teacher=model_fingerprint(teacher), **{"training data": data}
        )
        with PartialState().main_process_first():
            lock = self._lock() if PartialState().is_main_process else None
            if lock is not None:
                write_json(self.folder / DESCRIPTION, description)

        def with_targets(features: Any) -> dict[str, Tensor]:
            batch = collate(features)
            return batch | {"targets": batch["labels"], "ids": batch["sample_id"]}  # these are passed to `call`

        def call(targets: Tensor, ids: Tensor, **inputs: Tensor) -> dict[str, list[Tensor]]:
            rows = zip(teacher(**inputs).logits, targets, ids.tolist(), strict=True)
            found = [
                self.form.compress(one[labels != IGNORED], self.temperature, number) for one, labels, number in rows
            ]
            return {name: [columns[name] for columns in found] for name in found[0]}

        longest = int(column_array(rows, "length").max())
        outputs = cache_outputs(
            teacher,
            call,
            rows,
            with_targets,
            self.folder,
            data_fingerprint([description]),
            self.precision,
            batch_size,
            shard_rows=max(1, SHARD_TOKENS // longest),
            refuse_damaged=True,
        )
        del lock
        return StoredLogits(outputs.sample_ids, features=outputs.features)

    def _lock(self) -> FolderLock:
        """Locks the folder, as soon as no other run is filling it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        announced = False
        while True:
            try:
                return lock_folder(self.folder)
            except UserError as error:
                if not announced:
                    print(f"waiting: {str(error).partition(':')[0]}")
                announced = True
                time.sleep(POLL)


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
