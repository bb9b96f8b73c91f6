"""What a frozen teacher says about every view of every sample, filled in as views come up.

Where the views of a sample can be counted (81 crops x 2 mirrorings of a small image), a teacher's logits are a table:
rows sample_id * views + view. The first run fills it, every later one (another student, another seed) reads it, and no
run pays for a view twice. The file is sparse and memory-mapped: 50,000 images x 162 views x 100 classes are 1.6 GB.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.outputs import Outputs
from common.utils.files import write_text


class TeacherViews:
    """Logits (samples * views, classes) in fp16 under a key, in a folder.

    The key (`teacher_outputs.outputs_key`) stands for the teacher's weights, the data and the precision; a table under
    another key is not touched. What is returned went through fp16 also the first time, so that training does not
    depend on how full the table was.
    """

    def __init__(self, folder: str | Path, key: str, samples: int, views: int, classes: int) -> None:
        self.views = views
        path = Path(folder) / key[:20]
        path.mkdir(parents=True, exist_ok=True)
        description = {"samples": samples, "views": views, "classes": classes, "key": key}
        if not (path / "shape.json").exists():
            write_text(path / "shape.json", json.dumps(description))
        rows = samples * views
        logits = path / "logits.f16", np.dtype(np.float16), (rows, classes)
        filled = path / "filled.u8", np.dtype(np.uint8), (rows,)
        if not (_is_whole(*logits) and _is_whole(*filled)):  # what is left of the one says nothing without the other
            for file, dtype, shape in (logits, filled):
                with file.open("wb") as empty:
                    empty.truncate(_bytes(dtype, shape))  # sparse: zeros that take no space
        self.logits, self.filled = (np.memmap(f, dtype, mode="r+", shape=s) for f, dtype, s in (logits, filled))

    def batch(self, sample_ids: Tensor, views: Tensor, ask: Callable[[Tensor], Tensor]) -> Outputs:
        """Logits (batch, classes) of views (batch,) of samples (batch,); `ask(rows)` gives the teacher's logits of
        those rows of the batch that are not in the table yet.
        """
        rows = (sample_ids * self.views + views).cpu().numpy()
        missing = np.flatnonzero(self.filled[rows] == 0)
        if len(missing):
            said = ask(torch.from_numpy(missing).to(sample_ids.device))
            self.logits[rows[missing]] = said.float().cpu().numpy()
            self.filled[rows[missing]] = 1  # after the logits: a killed run leaves no row that is marked but empty
        return Outputs(logits=torch.from_numpy(self.logits[rows]).float().to(sample_ids.device))

    @property
    def share_filled(self) -> float:
        return float(self.filled.mean())


def _bytes(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * dtype.itemsize


def _is_whole(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> bool:
    return path.exists() and path.stat().st_size == _bytes(dtype, shape)
