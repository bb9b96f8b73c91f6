"""The pictures of a split as they are stored, and their class ids."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import numpy as np
import pyarrow.compute as pc
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from kd.common.utils.errors import UserError


class PictureError(UserError):
    """A picture that cannot be used. One line also from a worker process, which adds its traceback in front."""

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


@dataclass(frozen=True)
class Rows:
    """Pictures as they are stored: those at `places` (images,) of a raw split, with labels (images,) int64."""

    split: str  # the name of the raw split, for messages: a validation split may have been cut out of train
    source: datasets.Dataset  # of one column `image`, {"bytes", "path"}
    places: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, chosen: Tensor) -> "Rows":
        return Rows(self.split, self.source, self.places[chosen], self.labels[chosen])

    def stored(self, row: int) -> dict[str, Any]:
        """What the dataset has of a picture: the `bytes` of its file, or the `path` to it."""
        return self.source[int(self.places[row])]["image"] or {}

    def where(self, row: int) -> str:
        stored = self.stored(row)
        by_number = f"image {int(self.places[row])} of {self.split}"
        return by_number if stored.get("bytes") is not None else stored.get("path") or by_number

    def encoded(self, row: int) -> bytes:
        """The file of a picture, PNG or JPEG as it may be."""
        with self._opened(row) as file:
            return file.read()

    def file_sizes(self) -> np.ndarray:
        """Bytes (images,) int64 of each file, without reading any."""
        images = self.source.with_format("arrow")[:]["image"]
        lengths = pc.fill_null(pc.binary_length(pc.struct_field(images, "bytes")), -1).to_numpy()
        paths = pc.struct_field(images, "path").to_pylist()
        sizes = lengths.astype(np.int64)[self.places.numpy()]
        for row in np.flatnonzero(sizes < 0).tolist():
            try:
                sizes[row] = os.stat(paths[int(self.places[row])] or "").st_size
            except OSError:
                self.check(row)  # which refuses it in one line
        return sizes

    def picture(self, row: int) -> Image.Image:
        """Grey (mode L) or in colour (RGB), turned upright."""
        encoded = self.encoded(row)
        with self._decoding(row, len(encoded)):
            return _eight_bit(datasets.Image().decode_example({"bytes": encoded, "path": None}))

    def check(self, row: int) -> None:
        """Raises PictureError where the beginning of a picture's file is that of none, or of one that is not used."""
        with self._opened(row) as file, self._decoding(row, file.seek(0, io.SEEK_END)), Image.open(file) as picture:
            _refuse_deep(picture)

    @contextmanager
    def _opened(self, row: int) -> Iterator[BinaryIO]:
        """The file of a picture; what the operating system refuses is one line."""
        stored = self.stored(row)
        held, path = stored.get("bytes"), stored.get("path")
        if held is None and not path:
            raise PictureError(f"{self.where(row)} is missing: remove the row or give it a picture")
        try:
            with io.BytesIO(held) if held is not None else Path(str(path)).open("rb") as file:
                yield file
        except OSError as error:
            raise PictureError(f"{self.where(row)} cannot be read ({error.strerror}): replace or remove it") from None

    @contextmanager
    def _decoding(self, row: int, size: int) -> Iterator[None]:
        """Turns whatever a decoder raises about a file of `size` bytes into one line."""
        try:
            yield
            return
        except UnidentifiedImageError:
            reason = "it is no picture" if size else "the file is empty"
        except Image.DecompressionBombError:
            reason = f"it has more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels"
        except Exception as error:  # damaged bytes: OSError, SyntaxError, zlib.error, whatever the decoder raises
            reason = " ".join(str(error).split())
        raise PictureError(f"{self.where(row)} cannot be read ({reason}): replace or remove it")


def _eight_bit(picture: Image.Image) -> Image.Image:
    _refuse_deep(picture)
    if picture.mode in ("L", "RGB"):
        return picture
    if "transparency" in picture.info:
        picture = picture.convert("RGBA")  # as Pillow asks for
    return picture.convert("L" if picture.mode in ("1", "LA") else "RGB")


def _refuse_deep(picture: Image.Image) -> None:
    if picture.mode[0] in "IF":  # pillow would clip what is above 255, so nearly everything, to white
        raise ValueError("it has more than 8 bits per pixel, and is to be converted to 8")
