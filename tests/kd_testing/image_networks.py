"""Networks as training leaves them, and what their maps may differ by."""

import torch
from torch import Tensor, nn


def randomize_norms(model: nn.Module) -> None:
    """So that leaving a batch norm out would show."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                assert tensor is not None
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                assert tensor is not None
                nn.init.uniform_(tensor, -0.5, 0.5)


def assert_close_features(found: Tensor, expected: Tensor) -> None:
    """Up to rounding, which in a deep network of random norms is that of its largest values."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * max(10, expected.abs().max().item()))
