"""Two views of each image at once: one as everywhere, and one that is changed strongly.

As multi-level logit distillation shows them to teacher and student alike (Jin et al., CVPR 2023): crop and mirror, and
the same crop after RandAugment (arXiv:1909.13719) with two operations of magnitude 10 and cutout (arXiv:1708.04552) of
a square of up to half the width.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2  # type: ignore[import-untyped]

from image_classification.data.views import Views

CUT_OUT = 0.25  # of the area, at most


class StrongViews(Views):
    """A batch holds its images twice: pixel_values (2 * batch, 3, height, width) are the views of `Views`, then the
    same views changed; labels and sample_id (2 * batch,).

    The change is a function of (seed, epoch, image) alone. There is no `view`: such views cannot be counted, so
    nothing can be looked up by their number.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.epoch = torch.tensor(0).share_memory_()  # workers see it, also those that outlive an epoch
        super().__init__(*args, **kwargs)
        grey = self.mean.round().to(torch.uint8).tolist()
        self.change = v2.Compose([v2.RandAugment(num_ops=2, magnitude=10, fill=grey), cut_out(grey)])

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.epoch.fill_(epoch)

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        weak = super().__getitems__(rows)
        pixels = self.crop(weak["sample_id"], weak["view"]).permute(0, 3, 1, 2)  # (batch, channels, height, width)
        strong = torch.stack([self._changed(row, image) for row, image in zip(rows, pixels, strict=True)])
        return {
            "pixel_values": torch.cat([weak["pixel_values"], self.normalized(strong.permute(0, 2, 3, 1))]),
            "labels": weak["labels"].repeat(2),
            "sample_id": weak["sample_id"].repeat(2),
        }

    def _changed(self, row: int, image: Tensor) -> Tensor:
        # SeedSequence mixes the three well; a generator of torch uses the lower 32 bits of its seed only.
        own_seed = np.random.SeedSequence([self.seed, int(self.epoch), row]).generate_state(1).item()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(own_seed)  # torch.manual_seed would reset those of GPUs as well
            return self.change(image)


def cut_out(fill: list[int]) -> v2.RandomErasing:
    """Fills a square of up to CUT_OUT of the area, wherever it fits."""
    return v2.RandomErasing(p=1.0, scale=(1e-3, CUT_OUT), ratio=(1.0, 1.0), value=fill)
