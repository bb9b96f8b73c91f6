"""Shared by the tests of text models."""

from pathlib import Path

import numpy as np
import pytest

from nlp.data.intents import load_intents


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    """A folder with a few of the embedded intents."""
    folder = tmp_path_factory.mktemp("data") / "few_intents"
    for split, rows in load_intents().items():
        labels = np.array(rows["intent"])
        chosen = [i for c in range(41) for i in np.flatnonzero(labels == c)[: 10 if split == "train" else 3]]
        rows.select(chosen).to_parquet(folder / f"{split}.parquet")
    return folder
