"""The embedded pairs of texts with scores: two of the embedded intents, 1 for the same intent and 0 for others."""

import datasets
import numpy as np

from kd.nlp.data.intents import load_intents

PAIRS = 500  # in each split


def load_intent_pairs() -> datasets.DatasetDict:
    """Validation and test with the columns text1, text2 and score. Half of the pairs have the same intent."""
    splits = {}
    for split, rows in load_intents().items():
        if split == "train":
            continue
        rng, intents, texts = np.random.default_rng(0), np.array(rows["intent"]), rows["text"][:]
        scores = np.arange(PAIRS) % 2
        first = rng.choice(len(intents), PAIRS, replace=False)
        others = [
            np.flatnonzero((intents == intents[i]) == (score == 1)) for i, score in zip(first, scores, strict=True)
        ]
        pairs = {"text1": [texts[i] for i in first], "text2": [texts[rng.choice(same)] for same in others]}
        splits[split] = datasets.Dataset.from_dict({**pairs, "score": scores.astype(float).tolist()})
    return datasets.DatasetDict(splits)
