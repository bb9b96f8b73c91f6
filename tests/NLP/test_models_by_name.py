"""Loading models by name or folder: one-line errors, and a single request to an unreachable Hub."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
from transformers import AutoConfig, BertConfig, BertTokenizer, MarianConfig

from kd.common.utils.errors import UserError
from kd.nlp.data.loading import TextData
from kd.nlp.student_model.exportable import load
from kd.nlp.teacher_model.generative import load_translator
from kd.nlp.teacher_model.teacher import load_classifier, vocabulary

DATA = TextData(
    "two", {"train": datasets.Dataset.from_dict({"text": []})}, ["a", "b"], "classification", "accuracy", ""
)
LOADERS: dict[str, Callable[[str], Any]] = {
    "classifier": lambda name: load_classifier(name, DATA),
    "translator": lambda name: load_translator(name, 20),
    "exportable": lambda name: load(name, None),
}


def folder_without_weights(folder: Path, config: Any) -> str:
    config.save_pretrained(folder)
    BertTokenizer(vocab=vocabulary(["a few words"])).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("loader", "config"),
    [
        ("classifier", BertConfig()),
        ("classifier", MarianConfig()),  # Marian has no classifier
        ("translator", MarianConfig()),
        ("exportable", BertConfig(architectures=["BertForSequenceClassification"])),
    ],
)
def test_a_folder_without_weights_or_with_another_architecture(tmp_path, loader, config):
    with pytest.raises(UserError, match="no file named model.safetensors|Unrecognized configuration class"):
        LOADERS[loader](folder_without_weights(tmp_path, config))


@pytest.mark.parametrize("loader", LOADERS)
def test_an_unreachable_hub_gets_one_request(monkeypatch, loader):
    """Otherwise each client of the Hub would retry five times, for half a minute."""
    requests: list[str] = []

    def no_route() -> None:
        requests.append("the Hub")
        raise OSError("no route to host")

    def offline(name: str) -> None:
        assert huggingface_hub.constants.HF_HUB_OFFLINE
        raise OSError("it is not in the cache")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", no_route)
    monkeypatch.setattr(AutoConfig, "from_pretrained", offline)
    with pytest.raises(UserError, match="owner/name"):
        LOADERS[loader]("owner/name")
    assert requests == ["the Hub"] and not huggingface_hub.constants.HF_HUB_OFFLINE
