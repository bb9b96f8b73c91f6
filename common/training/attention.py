"""Which attention kernel a model trains with."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from kd.common.training.batching import column_array

LONGEST = 128  # tokens; torch's fused kernel is ahead from about 256 on


@contextmanager
def eager_attention_on_cpu(model: nn.Module, dataset: Any, precision: str, device: str) -> Iterator[None]:
    """Plain attention while a model of transformers trains on short texts in bf16 on a CPU; elsewhere as it is.

    There a forward and backward pass through torch's fused kernel takes up to seven times as long as matrix products
    and a softmax do. Without gradients it is no slower overall, so it comes back. Figures: benchmarks/README.md.
    The lengths are the column `length` of `dataset`, in tokens.
    """
    before = getattr(getattr(model, "config", None), "_attn_implementation", None)
    short = "length" in getattr(dataset, "column_names", ()) and column_array(dataset, "length").max() <= LONGEST
    if not (short and before == "sdpa" and precision == "bf16" and device == "cpu"):
        yield
        return
    model.set_attn_implementation("eager")  # type: ignore[operator]
    try:
        yield
    finally:
        model.set_attn_implementation(before)  # type: ignore[operator]
