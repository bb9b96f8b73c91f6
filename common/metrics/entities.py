"""Metrics of token classification: tags of words, and the entities that IOB2 tags describe.

In IOB2, `B-TYPE` begins an entity, `I-TYPE` continues it, and any other tag, such as `O`, belongs to none. An entity
is right if its type, first and last word are right. The metrics equal those of seqeval (tests/common/test_entities.py
has its figures), which is not used, because it has had no release since 2020.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kd.common.metrics.verdict import f1_of_counts

OUTSIDE = "O"
Tags = Sequence[str]  # of the words of a sentence


class Entity(NamedTuple):
    """The words first, ..., last - 1 of a sentence."""

    type: str
    first: int
    last: int


def is_iob(names: Sequence[str]) -> bool:
    """Whether tags describe entities: `B-TYPE` and `I-TYPE` and, mostly, one other tag."""
    parts = [_split(name)[0] for name in names]
    return "B" in parts and sum(part == "" for part in parts) <= 1


def entities(tags: Tags) -> set[Entity]:
    """The entities of a sentence. An `I-` tag that continues none belongs to no entity (seqeval's strict mode, for
    IOB2).
    """
    found, first, current = set(), 0, ""
    for place, tag in enumerate([*tags, OUTSIDE]):
        prefix, kind = _split(tag)
        if prefix == "I" and kind == current:
            continue
        if current:
            found.add(Entity(current, first, place))
        first, current = place, kind if prefix == "B" else ""
    return found


def begin_entities(tags: Tags) -> list[str]:
    """The same tags with `B-` in place of each `I-` that continues no entity of its type. It converts IOB1 to IOB2,
    and gives the tags of a model the meaning that conlleval gives them.
    """
    fixed, current = [], ""
    for tag in tags:
        prefix, kind = _split(tag)
        fixed.append(f"B-{kind}" if prefix == "I" and kind != current else tag)
        current = kind
    return fixed


def _split(tag: str) -> tuple[str, str]:
    """Prefix and type: (B, PER) of B-PER, and two empty strings for tags without a prefix B or I."""
    prefix, _, kind = tag.partition("-")
    return (prefix, kind) if prefix in ("B", "I") and kind else ("", "")


def entity_metrics(predicted: Sequence[Tags], actual: Sequence[Tags]) -> dict[str, float]:
    """Returns precision, recall and f1 of all entities (micro), f1_macro, the mean over their types, f1_conll, and the
    accuracy of the tags.

    precision, recall and f1 are strict. f1_conll is that of the conlleval script and of seqeval by default, which
    published figures mostly are: an `I-` tag that continues no entity begins one (`begin_entities`).
    """
    counts = entity_counts(predicted, actual)
    right, found, existing = counts.sum(axis=0)
    lenient = entity_counts([begin_entities(tags) for tags in predicted], [begin_entities(tags) for tags in actual])
    return {
        "f1": f1_of_counts(counts),
        "precision": float(right / found) if found else 0.0,
        "recall": float(right / existing) if existing else 0.0,
        "f1_macro": _f1_by_type(predicted, actual),
        "f1_conll": f1_of_counts(lenient),
        "accuracy": float(
            np.mean(
                [
                    a == b
                    for tags, other in zip(predicted, actual, strict=True)
                    for a, b in zip(tags, other, strict=True)
                ]
            )
        ),
    }


def entity_counts(predicted: Sequence[Tags], actual: Sequence[Tags]) -> np.ndarray:
    """Counts (sentences, 3) for `f1_of_counts`: right, predicted and actual entities of each sentence."""
    pairs = [(entities(tags), entities(other)) for tags, other in zip(predicted, actual, strict=True)]
    return np.array([(len(found & right), len(found), len(right)) for found, right in pairs])


def _f1_by_type(predicted: Sequence[Tags], actual: Sequence[Tags]) -> float:
    """The mean F1 over the types of the actual and predicted entities; 0 without any."""
    counts: dict[str, np.ndarray] = defaultdict(lambda: np.zeros((1, 3), dtype=int))
    for tags, other in zip(predicted, actual, strict=True):
        found, existing = entities(tags), entities(other)
        for column, part in enumerate((found & existing, found, existing)):
            for entity in part:
                counts[entity.type][0, column] += 1
    return float(np.mean([f1_of_counts(one) for one in counts.values()])) if counts else 0.0
