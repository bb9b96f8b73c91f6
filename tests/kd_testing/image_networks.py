"""Networks with random batch norms, and the tolerance for comparing their features."""

import torch
from torch import Tensor, nn


def randomize_norms(model: nn.Module) -> None:
    """Randomizes batch norms, so that a missing one changes the output."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                assert tensor is not None
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                assert tensor is not None
                nn.init.uniform_(tensor, -0.5, 0.5)


def assert_close_features(found: Tensor, expected: Tensor) -> None:
    """Compares up to rounding. In a deep network with random norms, rounding scales with the largest values."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * max(10, expected.abs().max().item()))
