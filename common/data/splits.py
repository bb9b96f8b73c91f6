"""The splits of a dataset: their names, and the validation split that is set aside where there is none."""

import datasets
import numpy as np

from kd.common.utils.errors import UserError

Splits = dict[str, datasets.Dataset]

SPLIT_NAMES = {name: name for name in ("train", "validation", "validation_matched", "validation_mismatched", "test")}
SPLIT_NAMES |= {name: "validation" for name in ("valid", "dev", "val")}
SPLIT_SEED = 0  # not the seed of a run: another run must not train on rows that measured the first


def usual_names(found: Splits, dataset: str, needs_train: bool = True) -> tuple[Splits, list[str]]:
    """Renames dev, valid and val to validation. A split with another name is not used, and a note reports it.

    Raises UserError where there is no train split although `needs_train`, no known split, or a split without rows.
    """
    splits: Splits = {}
    for name, rows in found.items():
        usual = SPLIT_NAMES.get(name)
        if usual in splits:
            raise UserError(f"{dataset} has two {usual} splits ({', '.join(found)}): keep one")
        if usual:
            splits[usual] = rows
    if needs_train and "train" not in splits:
        raise UserError(f"{dataset} has no train split, only {', '.join(found)}: name one of its files train.*")
    if not splits:
        raise UserError(f"{dataset} has no known split, only {', '.join(found)}: name one of its files test.*")
    ordered = {name: splits[name] for name in SPLIT_NAMES if name in splits}
    if empty := [name for name, rows in ordered.items() if not len(rows)]:
        raise UserError(f"the {empty[0]} split is empty: it needs at least one row")
    return ordered, [f"split {name} is not used" for name in found if name not in SPLIT_NAMES]


def with_validation(splits: Splits, labels: np.ndarray, notes: list[str], share: float = 0.1) -> Splits:
    """The splits, with rows of train as validation where there is none; `labels` (rows,) as in `set_aside`."""
    if "train" not in splits or any(name.startswith("validation") for name in splits):
        return splits
    aside = set_aside(labels, notes, share)
    parts = {"train": ~aside, "validation": aside}
    return splits | {
        name: splits["train"].select(np.flatnonzero(rows)).flatten_indices() for name, rows in parts.items()
    }


def set_aside(labels: np.ndarray, notes: list[str], share: float = 0.1, advice: str = "") -> np.ndarray:
    """Mask (rows,) of the rows of train that become the validation split, always the same; adds a note.

    Args:
        labels: of train (rows,), class ids (integers) or scores (floats); all equal where rows have no label.
        share: of all rows, and of each class.
        advice: what to pass, in addition to a validation split, where train is too small.
    """
    chosen = holdout(labels, share)
    percent = f"{share * 100:.4g}%"
    if not chosen.any():
        raise UserError(
            f"no validation split, and too few training rows to set {percent} of them aside, {len(labels):,}: add a "
            f"validation split{advice}"
        )
    how = "stratified" if len(np.unique(labels)) > 1 else "random"
    notes.append(
        f"no validation split: {chosen.sum():,} rows of train, a {how} {percent}, were set aside, the same whatever "
        "the seed"
    )
    return chosen


def holdout(labels: np.ndarray, share: float) -> np.ndarray:
    """Mask (rows,) of a stratified `share`. Of each class (integer labels) a row remains outside of it."""
    chosen = stratified(labels, share)
    if np.issubdtype(labels.dtype, np.integer):
        order = _by_label(labels)
        emptied = ~np.isin(labels, labels[~chosen])
        first_of_class = order[np.unique(labels[order], return_index=True)[1]]
        chosen[first_of_class[emptied[first_of_class]]] = False
    return chosen


def stratified(labels: np.ndarray, share: float) -> np.ndarray:
    """Mask (rows,) of a `share` of the rows: evenly spaced ones in the order of their labels."""
    chosen = np.zeros(len(labels), dtype=bool)
    chosen[_by_label(labels)[np.diff(np.floor(np.arange(len(labels) + 1) * share + 0.5)) > 0]] = True
    return chosen


def _by_label(labels: np.ndarray) -> np.ndarray:
    """The rows in the order of their labels; those of a label in a random order, always the same."""
    return np.lexsort((np.random.default_rng(SPLIT_SEED).random(len(labels)), labels))
