"""A table of a frozen teacher's logits for every view of every sample, filled as training reaches the views.

Where the views of a sample can be counted (81 crops x 2 mirrorings of a small image), the teacher's logits are a table
with the rows sample_id * views + view. The first run fills it, and every later one (another student, another seed)
reads it, so that no view is computed twice. The file is sparse and memory-mapped: 50,000 images x 162 views x 100
classes are 1.6 GB. Each row has a checksum, 0 while it is empty: a row that does not match is computed again, whether
it was damaged, cut off, or never filled. Several processes may fill a table at once, since all write the same values.
Outputs that are computed in one pass over a dataset are columns instead (`teacher_outputs`).
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
    """Logits (samples * views, classes) in fp16, in a folder, under a key for all that decides them.

    The key (`fingerprints.outputs_key`) is made from the teacher's weights, the data and the precision; tables of
    other keys are not touched. Logits are rounded to fp16 also when they are computed, so that training does not
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

    def batch(self, sample_ids: Tensor, views: Tensor, compute: Callable[[Tensor], Tensor]) -> Outputs:
        """Logits (batch, classes) of views (batch,) of samples (batch,). `compute(rows)` returns the teacher's logits
        of those rows of the batch that are not in the table.
        """
        rows = (sample_ids * self.views + views).cpu().numpy()
        logits, checksums = self.logits[rows], self.checksums[rows]
        missing = np.flatnonzero(self._checksums_of(rows, logits) != checksums)
        if len(missing):
            self._warn_of_damage(checksums[missing])
            logits[missing] = compute(torch.from_numpy(missing).to(sample_ids.device)).float().cpu().numpy()
            self._write(rows[missing], logits[missing])
        return Outputs(logits=torch.from_numpy(logits).float().to(sample_ids.device))

    def _checksums_of(self, rows: np.ndarray, logits: np.ndarray) -> np.ndarray:
        """Of the logits and the number of each row, so that no row matches in the place of another; never 0."""
        starts = (int(row + self._start) % 2**32 for row in rows)
        found = (zlib.crc32(values, start) or 1 for values, start in zip(logits, starts, strict=True))
        return np.fromiter(found, np.uint32, len(rows))

    def _write(self, rows: np.ndarray, logits: np.ndarray) -> None:
        """With ordinary writes, because on a full disk a write to mapped memory would kill the process. Checksums are
        written last: a killed run leaves no row with a checksum and no logits.
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
    """A file as an array. It is extended with zeros that take no space, and nothing else in it changes."""
    with path.open("ab") as file:
        file.truncate(math.prod(shape) * dtype.itemsize)
    return np.memmap(path, dtype, mode="r", shape=shape)
