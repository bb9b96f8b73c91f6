"""Shared by the tests of images."""

from collections.abc import Iterator
from functools import cache

import pytest

from image_classification.data import loading, rows, sources
from image_classification.data.loading import Images
from image_classification.data.rows import Rows


@pytest.fixture(autouse=True, scope="session")
def _digits_are_decoded_once() -> Iterator[None]:
    """Each script that a test runs would write the embedded digits as PNG and read them again: half a CPU-second."""
    digits, decode = cache(sources.embedded_digits), loading._decode
    decoded: dict[tuple[bytes, int | None], Images] = {}

    @cache
    def fingerprint() -> str:
        return rows._encoded(digits(), "image")._fingerprint

    def decode_once(split: Rows, size: int | None) -> Images:
        if split.source._fingerprint != fingerprint():
            return decode(split, size)
        key = split.places.numpy().tobytes(), size
        if key not in decoded:
            decoded[key] = decode(split, size)
        return Images(decoded[key].pixels.clone(), split.labels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "embedded_digits", digits)
        patch.setattr(loading, "_decode", decode_once)
        yield
