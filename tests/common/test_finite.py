"""Weights that are not finite are detected before they are saved."""

import pytest
import torch

from kd.common.utils.errors import UserError
from kd.common.utils.finite import check_finite_weights, non_finite_tensor
from kd_testing.tiny import model


def test_the_first_parameter_or_buffer_that_is_not_finite_is_named():
    first, second = model(), torch.nn.BatchNorm1d(3)
    assert non_finite_tensor(first, second) is None
    check_finite_weights(first, second, when="after step 3")
    with torch.no_grad():
        first.head.bias[1] = -torch.inf
    second.running_var[0] = torch.nan
    assert non_finite_tensor(first, second) == "head.bias"
    assert non_finite_tensor(second) == "running_var"
    with pytest.raises(UserError, match=r"head\.bias is not finite after step 3; try a lower learning rate"):
        check_finite_weights(first, when="after step 3")


def test_a_buffer_may_contain_minus_infinity():
    masked = model()
    masked.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
    assert non_finite_tensor(masked) is None
    masked.mask[0, 0] = torch.inf
    assert non_finite_tensor(masked) == "mask"
