"""Metrics of tasks with an out-of-scope class: overall accuracy hides how well it is recognised."""

import numpy as np

OUT_OF_SCOPE = "oos"


def scope_metrics(logits: np.ndarray, labels: np.ndarray, label_names: list[str]) -> dict[str, float]:
    """Returns accuracy_in_scope and oos_recall, each where it has rows; nothing for tasks without the label "oos".

    `logits` is (rows, classes), `labels` (rows,). An in-scope row that is predicted out of scope counts as wrong.
    """
    if OUT_OF_SCOPE not in label_names:
        return {}
    right = logits.argmax(axis=-1) == labels
    outside = labels == label_names.index(OUT_OF_SCOPE)
    rows = {"accuracy_in_scope": ~outside, "oos_recall": outside}
    return {name: float(right[chosen].mean()) for name, chosen in rows.items() if chosen.any()}
