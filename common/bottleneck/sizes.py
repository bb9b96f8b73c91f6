"""Bytes of a model with a bottleneck, by part, and of the codes of an embedding."""

from typing import Any

from torch import nn

from kd.common.bottleneck.module import DiscreteKeyValueBottleneck

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
