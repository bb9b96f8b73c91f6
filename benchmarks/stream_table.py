"""The table of `streams.py`."""

from collections import defaultdict
from typing import Any

from stream_heads import COUNTED, PROBE

from kd.common.metrics.verdict import measure_mean, verdict_of_one_seed, verdict_over_seeds
from kd.common.reporting.tables import gain_with_interval, markdown, mean_and_deviation

Records = list[dict[str, Any]]  # of one head with the same keys, one for each order


def table_of(records: Records) -> str:
    """Means over the orders with standard deviations; differences in points with 95 % intervals, paired by order.

    Several keys have a column, and differences from the first keys of the records.
    """
    groups: dict[tuple[str, str], Records] = defaultdict(list)
    for record in records:
        groups[record["head"], record["keys"]].append(record)
    first = records[0]["keys"]
    several = any(keys != first for _, keys in groups)
    rows = []
    for (head, keys), group in groups.items():
        references = [(PROBE, first), (COUNTED, keys), *([(head, first)] if several else [])]
        rows.append(
            [
                head,
                *([keys] if several else []),
                mean_and_deviation([record["accuracy"] for record in group]),
                mean_and_deviation([record["forgetting"] for record in group if record["forgetting"] is not None]),
                *(difference(group, groups[reference]) for reference in references),
                "–" if group[0]["setting"] is None else f"{group[0]['setting']:g}",
            ]
        )
    minus = ["linear probe", "counted values", *(["the first keys"] if several else [])]
    header = ["head", *(["keys"] if several else []), "accuracy", "forgetting"]
    return markdown([*header, *(f"minus {reference}, points" for reference in minus), "setting"], rows)


def difference(group: Records, reference: Records) -> str:
    """The paired difference of accuracy in points, with its interval."""
    if group is reference:
        return "–"
    verdicts = []
    for record, other in zip(group, reference, strict=True):
        scores = [measure_mean(100 * one["right"]).score for one in (record, other)]
        verdicts.append(verdict_of_one_seed(*scores, len(record["right"])))
    return gain_with_interval(verdict_over_seeds(verdicts), decimals=1)
