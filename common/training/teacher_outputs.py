"""What a frozen teacher said about each sample, kept on disk and looked up by sample id.

A frozen teacher says the same every epoch, to every student and every seed, so it speaks once. The lookup goes by
sample id and never by position: shuffling, resuming or another batch size cannot pair a sample with another's
outputs. A cache file carries a key made from the teacher's weights and the data, and a checksum of its content; a
file that is damaged or belongs to something else is rebuilt.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from kd.common.outputs import Outputs

logger = logging.getLogger(__name__)


class TeacherOutputs:
    """Logits and named features by sample id.

    Args:
        sample_ids: (samples,) distinct integers.
        logits: (samples, classes), or None.
        features: {name: (rows, width)}, the positions of all samples one after another.
        lengths: (samples,) number of positions of each sample; needed with features.
    """

    def __init__(
        self,
        sample_ids: Tensor,
        logits: Tensor | None = None,
        features: dict[str, Tensor] | None = None,
        lengths: Tensor | None = None,
    ) -> None:
        self.sample_ids, self.logits, self.features = sample_ids, logits, features or {}
        self.lengths = torch.zeros_like(sample_ids) if lengths is None else lengths
        self._sorted_ids, self._order = sample_ids.sort()
        if len(self._sorted_ids.unique()) != len(sample_ids):
            raise ValueError("sample ids must be distinct")
        self._starts = self.lengths.cumsum(0) - self.lengths

    def batch(self, sample_ids: Tensor, positions: int | None = None, device: torch.device | None = None) -> Outputs:
        """Outputs of these samples, features padded with zeros to `positions` (batch, positions, width).

        Raises KeyError for a sample that the teacher was never asked about.
        """
        ids = sample_ids.cpu()
        places = torch.searchsorted(self._sorted_ids, ids).clamp(max=len(self._sorted_ids) - 1)
        unknown = ids[self._sorted_ids[places] != ids]
        if len(unknown):
            raise KeyError(f"no teacher outputs for sample {unknown[0].item()}")
        rows = self._order[places]
        features = {name: self._padded(table, rows, positions).to(device) for name, table in self.features.items()}
        logits = None if self.logits is None else self.logits[rows].to(device)
        return Outputs(logits=logits, features=features)

    def _padded(self, table: Tensor, rows: Tensor, positions: int | None) -> Tensor:
        spans = zip(self._starts[rows].tolist(), self.lengths[rows].tolist(), strict=True)
        padded = pad_sequence([table[start : start + length] for start, length in spans], batch_first=True)
        missing = (positions or padded.shape[1]) - padded.shape[1]
        return nn.functional.pad(padded, (0, 0, 0, missing))

    # ---- on disk ----

    @classmethod
    def load_or_compute(
        cls, folder: str | Path, key: str, compute: Callable[[], "TeacherOutputs"], write: bool = True
    ) -> "TeacherOutputs":
        """The outputs under `key` in a folder, computed and (in one process of several) written where need be."""
        path = Path(folder) / f"{key[:20]}.safetensors"
        if path.exists():
            found = cls._read(path, key)
            if found is not None:
                return found
            logger.warning("teacher outputs in %s are damaged or belong to something else: computing them anew", path)
        outputs = compute()
        if write:
            outputs._write(path, key)
        return outputs

    @classmethod
    def _read(cls, path: Path, key: str) -> "TeacherOutputs | None":
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError):
            return None
        if metadata.get("key") != key or metadata.get("checksum") != _checksum(tensors.items()):
            return None
        features = {name.removeprefix("features."): t for name, t in tensors.items() if name.startswith("features.")}
        return cls(tensors["sample_ids"], tensors.get("logits"), features, tensors["lengths"])

    def _write(self, path: Path, key: str) -> None:
        tensors = {"sample_ids": self.sample_ids, "lengths": self.lengths}
        tensors |= {f"features.{name}": table for name, table in self.features.items()}
        if self.logits is not None:
            tensors["logits"] = self.logits
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")  # several runs may write to one folder
        try:
            save_file(tensors, str(partial), metadata={"key": key, "checksum": _checksum(tensors.items())})
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def outputs_key(teacher: nn.Module, *parts: object) -> str:
    """Key of a teacher's outputs: a hash of its weights and of whatever else decides them (data, precision, names)."""
    weights = _checksum(teacher.state_dict().items())
    return hashlib.sha256("\n".join([weights, *map(str, parts)]).encode()).hexdigest()


def _checksum(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
