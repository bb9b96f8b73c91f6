"""Large images: too many pixels for memory, so that each is decoded when it is needed, and cropped as in ImageNet."""

import hashlib
import json
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2  # type: ignore[import-untyped]
from tqdm.auto import tqdm

from kd.common.utils.errors import UserError
from kd.image_classification.data.dataset import ImageData, ImageViews
from kd.image_classification.data.rows import Rows

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet's pixels, which pretrained networks expect
READ_AT_ONCE = 2**30  # bytes of files that the fingerprint reads whole: a second or two
HASHED = 500  # images of a larger split of which the fingerprint reads at least so many
CHECKED = 50_000  # images of a split of which at most about so many are opened before training


@dataclass(frozen=True, kw_only=True)
class LargeImageData(ImageData):
    """A dataset of images of any shape, decoded by whoever looks at them.

    Training wants `--dataloader_num_workers`, of which each decodes some hundred images a second.
    """

    splits: dict[str, Rows]

    def views(
        self, split: str, device: torch.device, augment: bool = False, seed: int = 0, strong: bool = False
    ) -> "LargeViews":
        """The centre of each image, or (`augment`) a random part of it, mirrored half of the time."""
        if strong:
            raise UserError("--strong_views are made of images of 64 pixels or less: leave it out")
        return LargeViews(self.splits[split], self.size, self.mean, self.std, device, augment, seed)


class LargeViews(ImageViews):
    """Images decoded on demand, yielded a whole batch at a time; collate with `identity_collate`.

    With `augment` a view is a random 8 to 100 % of the image's area, resized; it is a function of (seed, epoch, image)
    alone, whichever process makes it and however many there are, so that a run that is resumed sees what it would have
    seen. Otherwise it is the centre, after the shorter side was resized to `shorter_side(size)`.

    A batch holds pixel_values (batch, 3, size, size) fp32 in channels_last order, labels and sample_id, each (batch,).
    There is no `view`: the views of an image cannot be counted, so nothing can be looked up by their number. Batches
    lie on `device`, or on the CPU where a worker process makes them. Grey images become three equal channels.
    """

    def __init__(
        self,
        rows: Rows,
        size: int,
        mean: list[float],
        std: list[float],
        device: torch.device,
        augment: bool = False,
        seed: int = 0,
    ) -> None:
        self.rows, self.device, self.augment, self.seed = rows, device, augment, seed
        self.mean, self.std = torch.tensor(mean) * 255, torch.tensor(std) * 255
        steps: list[torch.nn.Module] = [v2.Resize(shorter_side(size)), v2.CenterCrop(size)]
        if augment:
            steps = [v2.RandomResizedCrop(size, scale=(0.08, 1)), v2.RandomHorizontalFlip()]
        self.transform = v2.Compose(steps)
        self.epoch = torch.tensor(0).share_memory_()  # workers see it, also those that outlive an epoch

    def set_epoch(self, epoch: int) -> None:
        """Chooses new views. Called by the trainer before it iterates over an epoch."""
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        in_worker = torch.utils.data.get_worker_info() is not None  # where a GPU cannot be touched after a fork
        device = torch.device("cpu") if in_worker else self.device
        pixels = torch.stack([self.view(row) for row in rows]).to(device)  # (batch, size, size, 3) uint8
        normalized = (pixels.float() - self.mean.to(device)) / self.std.to(device)
        ids = torch.tensor(rows)
        return {
            "pixel_values": normalized.permute(0, 3, 1, 2),  # channels_last without copying
            "labels": self.rows.labels[ids].to(device),
            "sample_id": ids.to(device),
        }

    def view(self, row: int) -> Tensor:
        """(size, size, 3) uint8: this epoch's view of an image."""
        picture = self.rows.picture(row).convert("RGB")
        if not self.augment:
            return _pixels(self.transform(picture))
        # SeedSequence mixes the three well; a generator of torch uses the lower 32 bits of its seed only.
        own_seed = np.random.SeedSequence([self.seed, int(self.epoch), row]).generate_state(1).item()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(own_seed)  # torch.manual_seed would reset those of GPUs as well
            return _pixels(self.transform(picture))


def large_images(
    name: str, splits: dict[str, Rows], label_names: list[str], size: int, notes: list[str]
) -> LargeImageData:
    """Opens the pictures, without decoding them: what is none is found now and not after hours of training."""
    for split, rows in splits.items():
        places = range(0, len(rows), -(-len(rows) // CHECKED))
        for row in tqdm(places, desc=f"checking {split}", leave=False, disable=len(places) < 5000):
            rows.check(row)
    return LargeImageData(
        name=name,
        splits=splits,
        label_names=label_names,
        mean=MEAN,
        std=STD,
        size=size,
        fingerprint=_fingerprint(splits, label_names, size),
        notes=notes,
    )


def shorter_side(size: int) -> int:
    """What the shorter side is resized to before the centre is cut out: 256 for 224."""
    return round(size * 256 / 224)


def _pixels(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture))


def _fingerprint(splits: dict[str, Rows], label_names: list[str], size: int) -> str:
    """Of all labels and of the sizes of all files in their order, and of what the files hold: of all of them or, where
    that would take minutes, of evenly spaced ones.
    """
    digest = hashlib.sha256(json.dumps([label_names, size]).encode())
    for name in sorted(splits):
        rows = splits[name]
        sizes = rows.file_sizes()
        digest.update(f"{name} {len(rows)}".encode())
        digest.update(rows.labels.numpy().data)
        digest.update(sizes.data)
        for row in range(0, len(rows), 1 if sizes.sum() <= READ_AT_ONCE else max(1, len(rows) // HASHED)):
            digest.update(rows.encoded(row))
    return digest.hexdigest()
