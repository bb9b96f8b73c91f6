"""The pretrained models on which a student depends: their names on the Hub, and their licences, from their cards."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from kd.common.data.sources import offline_if_unreachable

CARD = "README.md"
LICENCE = ("license", "license_name", "license_link")  # entries of the metadata of a card
Licence = dict[str, str | None]


def common_licence(licences: Mapping[str, Licence]) -> Licence:
    """The licence that the cards of all models state; empty if one states none, or another one."""
    found = list(licences.values())
    return found[0] if found and all(licence == found[0] for licence in found) else {}


def describe_licence(licence: Licence) -> str:
    """`apache-2.0`, or the name and the link of another licence."""
    if not licence.get("license"):
        return "no licence is stated"
    return ", ".join(str(licence[name]) for name in LICENCE if licence.get(name))


def hub_names(model: str) -> list[str]:
    """The name of a model on the Hub; for a local folder, the names that its card has as `base_model`."""
    if not is_local(model):
        return [model] if is_hub_name(model) else []
    based_on = _metadata_of(model, CARD).get("base_model")
    names = based_on if isinstance(based_on, list) else [based_on]
    return [name for name in names if isinstance(name, str) and is_hub_name(name)]


def is_hub_name(name: str) -> bool:
    """Whether a model is one of the Hub, because no local file or folder has its name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not is_local(name)


def licence_of(model: str) -> dict[str, str | None]:
    """The entries LICENCE of a model's card, or of the config.json next to it; empty without one.

    `model`: A name on the Hub, a local folder, or a file in one.
    """
    with offline_if_unreachable(model if is_local(model) else ""):
        for file in (CARD, "config.json"):
            found = _metadata_of(model, file)
            if isinstance(found.get("license"), str):
                return {name: found[name] for name in LICENCE if isinstance(found.get(name), str)}
    return {}


def _metadata_of(model: str, file: str) -> Mapping[str, Any]:
    """The metadata of a card, or the entries of a configuration, in a folder or on the Hub; empty if the file is
    missing or damaged.
    """
    folder = None
    if is_local(model):
        folder = Path(model) if Path(model).is_dir() else Path(model).parent
    try:
        path = folder / file if folder else Path(huggingface_hub.hf_hub_download(model, file))
        text = path.read_text(encoding="utf-8")
        found = yaml.safe_load(text if file != CARD else text.split("---\n")[1] if text.startswith("---\n") else "")
    except Exception:  # a model without a card, a Hub that cannot be reached, a damaged file: no licence is stated
        return {}
    return found if isinstance(found, dict) else {}


def is_local(name: str) -> bool:
    try:
        return bool(name) and Path(name).exists()
    except (OSError, ValueError):  # too long, or with a null character
        return False
