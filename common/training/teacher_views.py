"""A frozen teacher's logits of every view of every sample, filled in as views come up.

Where the views of a sample can be counted (81 crops x 2 mirrorings of a small image), a teacher's logits are a table:
rows sample_id * views + view. The first run fills it, every later one (another student, another seed) reads it, and no
run pays for a view twice. The file is sparse and memory-mapped: 50,000 images x 162 views x 100 classes are 1.6 GB.
Each row has a checksum, 0 while it is empty: a row that does not match is computed again, whether it was damaged, cut
off, or never filled. Several processes may fill a table at once, since all of them write the same values.
"""

import json
import logging
import math
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kd.common.outputs import Outputs
from kd.common.utils.errors import UserError
from kd.common.utils.files import write_text

logger = logging.getLogger(__name__)


class TeacherViews:
    """Logits (samples * views, classes) in fp16 under a key, in a folder.

    The key (`fingerprints.outputs_key`) stands for the teacher's weights, the data and the precision; a table under
    another key is not touched. What is returned went through fp16 also the first time, so that training does not
    depend on how full the table was.
    """

    def __init__(self, folder: str | Path, key: str, samples: int, views: int, classes: int) -> None:
        self.views = views
        path = Path(folder) / key[:20]
        path.mkdir(parents=True, exist_ok=True)
        description = json.dumps({"samples": samples, "views": views, "classes": classes, "key": key})
        shape = path / "shape.json"  # for readers of the folder
        if not shape.exists() or shape.read_bytes() != description.encode():
            write_text(shape, description)
        self._start = zlib.crc32(description.encode())  # rows of a table of another shape do not match
        self.logits = _table(path / "logits.f16", np.dtype(np.float16), (samples * views, classes))
        self.checksums = _table(path / "checksums.u32", np.dtype(np.uint32), (samples * views,))
        self._damage_reported = False

    def batch(self, sample_ids: Tensor, views: Tensor, ask: Callable[[Tensor], Tensor]) -> Outputs:
        """Logits (batch, classes) of views (batch,) of samples (batch,); `ask(rows)` gives the teacher's logits of
        those rows of the batch that are not in the table.
        """
        rows = (sample_ids * self.views + views).cpu().numpy()
        logits, checksums = self.logits[rows], self.checksums[rows]
        missing = np.flatnonzero(self._checksums_of(rows, logits) != checksums)
        if len(missing):
            self._warn_of_damage(checksums[missing])
            logits[missing] = ask(torch.from_numpy(missing).to(sample_ids.device)).float().cpu().numpy()
            self._write(rows[missing], logits[missing])
        return Outputs(logits=torch.from_numpy(logits).float().to(sample_ids.device))

    @property
    def share_filled(self) -> float:
        return float((self.checksums != 0).mean())

    def _checksums_of(self, rows: np.ndarray, logits: np.ndarray) -> np.ndarray:
        """Of each row's logits and number, so that a row in another's place does not match; never 0."""
        starts = (int(row + self._start) % 2**32 for row in rows)
        found = (zlib.crc32(values, start) or 1 for values, start in zip(logits, starts, strict=True))
        return np.fromiter(found, np.uint32, len(rows))

    def _write(self, rows: np.ndarray, logits: np.ndarray) -> None:
        """By ordinary writing, since a full disk would kill a process that writes to mapped memory. Checksums come
        last: a killed run leaves no row that is marked but empty.
        """
        for table, values in ((self.logits, logits), (self.checksums, self._checksums_of(rows, logits))):
            try:
                with open(str(table.filename), "r+b") as file:
                    for row, value in zip(rows, values, strict=True):
                        file.seek(int(row) * value.nbytes)
                        file.write(value.tobytes())
            except OSError as error:
                raise UserError(f"cannot write {table.filename}: {error.strerror}") from None

    def _warn_of_damage(self, checksums: np.ndarray) -> None:
        if checksums.any() and not self._damage_reported:
            logger.warning("%s is damaged: what does not match its checksum is computed again", self.logits.filename)
            self._damage_reported = True


def _table(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.memmap:
    """A file as an array. What it lacks becomes zeros that take no space; the rest stays, for it may be in use."""
    with path.open("ab") as file:
        file.truncate(math.prod(shape) * dtype.itemsize)
    return np.memmap(path, dtype, mode="r", shape=shape)
