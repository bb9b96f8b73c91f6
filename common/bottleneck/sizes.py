"""Bytes of a model with a bottleneck, by part, and of the codes of an embedding."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from kd.common.bottleneck.module import DiscreteKeyValueBottleneck
from kd.common.reporting.tables import number, words

Table = tuple[list[str], list[list[str]]]  # header and rows
PARTS = {  # tensors of a bottleneck by part; `frozen` is a flag
    "keys": ("keys", "projection"),
    "values": ("values", "scale"),
    "counts": ("key_sums", "key_counts", "label_counts", "frozen"),
}


def sizes(model: nn.Module) -> dict[str, int] | None:
    """Bytes of the saved tensors of a model by part, and of the codes of one embedding; None without a bottleneck.

    encoder: all tensors outside of the bottleneck. keys: with the projection. values: with their scales, if they are
    int8. counts: the moving averages that fit keys, and label counts. codes: `code_bits`, rounded up to bytes.
    """
    bottleneck = next((part for part in model.modules() if isinstance(part, DiscreteKeyValueBottleneck)), None)
    if bottleneck is None:
        return None
    state: dict[str, Any] = bottleneck.state_dict(keep_vars=True)  # keep_vars: a shared tensor stays one object
    parts = {name: [state.pop(tensor) for tensor in tensors if tensor in state] for name, tensors in PARTS.items()}
    parts["decoder"] = list(state.values())
    inside = {tensor for tensors in parts.values() for tensor in tensors}
    encoder = set(model.state_dict(keep_vars=True).values()) - inside
    found = {
        name: sum(t.numel() * t.element_size() for t in ts) for name, ts in ({"encoder": encoder} | parts).items()
    }
    return found | {"codes_of_an_embedding": -(-bottleneck.code_bits // 8)}


def byte_table(models: Mapping[str, dict[str, int] | None]) -> Table | None:
    """Header and rows of a table with a column for each model that has `sizes`; None if no model has."""
    found = {name: parts for name, parts in models.items() if parts}
    if not found:
        return None
    parts = next(iter(found.values()))
    rows = [[words(part), *(number(of_model[part]) for of_model in found.values())] for part in parts]
    return ["bytes", *found], rows
