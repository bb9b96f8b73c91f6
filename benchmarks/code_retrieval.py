"""Searches of a teacher's store of embeddings or codes with those of its student, for `carried_keys.py`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from key_models import Embeddings, KeyStudy
from torch import Tensor

from kd.common.bottleneck.module import DiscreteKeyValueBottleneck
from kd.common.bottleneck.training import set_keys
from kd.common.reporting.tables import mean_and_deviation, number

OTHER_SEED = 1_000  # of new keys: added to the seed of the teacher's keys
BYTES, EQUAL = "bytes per text", "equal codes"
RECALL, NEIGHBOUR = "recall@1 of the same text", "label of the nearest training text"
Scores = dict[str, dict[str, list[float]]]  # row -> column -> one number per run


@dataclass(frozen=True)
class Representation:
    """Texts as the student (queries) and the teacher (store) represent them, as vectors or as codes.

    queries: of the validation texts. bits: of one text in the store.
    """

    title: str
    bits: int
    queries: Tensor
    store: Embeddings
    nearest: Callable[[Tensor, Tensor], Tensor]

    def scores(self, study: KeyStudy) -> dict[str, float]:
        """By column of the table. Without those that are certain: a text is nearest to itself."""
        labels = study.labels[self.nearest(self.queries, self.store.train)]
        right = labels == torch.tensor(study.texts.validation["labels"])
        found = {BYTES: self.bits / 8, NEIGHBOUR: right.float().mean().item()}
        if self.queries is not self.store.validation:
            same = self.nearest(self.queries, self.store.validation) == torch.arange(len(self.queries))
            found[RECALL] = same.float().mean().item()
            if self.nearest is most_equal:
                found[EQUAL] = (self.queries == self.store.validation).float().mean().item()
        return found


def most_equal(codes: Tensor, store: Tensor) -> Tensor:
    """The row of the store with the most equal codes: codes (rows, C), store (texts, C) -> (rows,)."""
    codes, store = codes.short(), store.short()
    return torch.cat([(part[:, None] == store).sum(-1).argmax(1) for part in codes.split(16)])


def closest(vectors: Tensor, store: Tensor) -> Tensor:
    """The nearest row of the store (squared L2): vectors (rows, width), store (texts, width) -> (rows,)."""
    half_norms = store.square().sum(1) / 2
    return torch.cat([(part @ store.T - half_norms).argmax(1) for part in vectors.split(512)])


def representations(study: KeyStudy) -> Iterator[Representation]:
    teacher, student, unaligned = study.teacher, study.student[True], study.student[False]
    carried, _ = study.teacher_bottleneck("linear", 512)
    same_seed, new = (fitted_keys(study, student.train, seed) for seed in (study.seed, study.seed + OTHER_SEED))
    bits, width = carried.code_bits, teacher.train.shape[1]
    codes = of_splits(teacher, carried.encode)
    keys = of_splits(codes, lambda rows: keys_of(carried, rows))
    mean = teacher.train.mean(0)

    def signs(rows: Tensor) -> Tensor:
        return (rows - mean).sign()

    def directions(rows: Tensor) -> Tensor:
        return F.normalize(rows, dim=1)

    queries = student.validation
    yield Representation("embeddings, fp32", 32 * width, directions(queries), of_splits(teacher, directions), closest)
    yield Representation("signs of embeddings", width, signs(queries), of_splits(teacher, signs), closest)
    yield Representation("carried keys: distance to the keys", bits, carried.heads(queries).flatten(1), keys, closest)
    yield Representation("carried keys: equal codes", bits, carried.encode(queries), codes, most_equal)
    yield Representation("new keys: equal codes", bits, new.encode(queries), codes, most_equal)
    yield Representation("new keys, same texts and seed", bits, same_seed.encode(queries), codes, most_equal)
    yield Representation("carried keys, no alignment", bits, carried.encode(unaligned.validation), codes, most_equal)
    again = of_splits(student, new.encode)
    yield Representation("new keys, store of the student", bits, again.validation, again, most_equal)


def fitted_keys(study: KeyStudy, embeddings: Tensor, seed: int) -> DiscreteKeyValueBottleneck:
    bottleneck = study.new_bottleneck("linear", 512)
    set_keys(bottleneck, "new", None, embeddings, seed)
    return bottleneck


def of_splits(embeddings: Embeddings, function: Callable[[Tensor], Tensor]) -> Embeddings:
    return Embeddings(function(embeddings.train), function(embeddings.validation))


def keys_of(bottleneck: DiscreteKeyValueBottleneck, codes: Tensor) -> Tensor:
    """The keys (rows, C * key_dim) that codes (rows, C) name."""
    return bottleneck.keys[torch.arange(bottleneck.codebooks), codes].flatten(1)


def retrieval_table(retrieved: Scores) -> tuple[list[str], list[list[str]]]:
    columns = EQUAL, RECALL, NEIGHBOUR
    rows = [
        [title, number(row[BYTES][0]), *(mean_and_deviation(row[column]) for column in columns)]
        for title, row in retrieved.items()
    ]
    return ["store of the teacher, searched by", BYTES, *columns], rows
