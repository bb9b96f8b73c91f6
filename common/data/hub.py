"""The Hugging Face Hub, which may be out of reach."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub


@contextmanager
def no_retries_when_unreachable(name: str = "") -> Iterator[None]:
    """Asks the Hub once; where it does not answer, its clients go to the cache at once, not a minute later. Where
    `name` is a local folder it is not asked.
    """
    if name and Path(name).is_dir():
        yield
        return
    constants: Any = huggingface_hub.constants
    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # whatever the HTTP client of the day raises: offline mode, no name, refused, timeout, proxy
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before
