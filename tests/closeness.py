"""Comparisons whose tolerance is derived, not chosen.

A fast path in a low precision may be as wrong as the plain reference is in that same precision, times a small
factor for another order of summation: the truth is the reference in float64. Nothing else in tests/ names a tolerance.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

ORDER_FACTOR = 8.0  # another summation order may cost a few times the reference's own rounding error
FUSED_FACTOR = 2.0  # a fused kernel keeps in fp32 what the unfused chain rounds: it has little excuse


def allowed_error(reference: Tensor, truth: Tensor, factor: float = ORDER_FACTOR) -> float:
    """Largest absolute error a result may have, from the reference's own error against the float64 truth."""
    if truth.numel() == 0:
        return 0.0
    own_error = largest_error(reference, truth)
    one_rounding = torch.finfo(reference.dtype).eps * truth.double().abs().max().item()
    return factor * max(own_error, one_rounding)


def assert_close(name: str, actual: Tensor, reference: Tensor, truth: Tensor, *, factor: float = ORDER_FACTOR) -> None:
    """Fail, by name, where `actual` is farther from the truth than its precision excuses.

    Args:
        name: What is compared; it opens the failure's message.
        actual: The fast path's result, in the precision under test.
        reference: The reference's result in the same precision.
        truth: The reference's result in float64.
        factor: How many times the reference's own error is excused.
    """
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    assert actual.dtype == reference.dtype, f"{name}: dtype {actual.dtype}, expected {reference.dtype}"
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    error, budget = largest_error(actual, truth), allowed_error(reference, truth, factor)
    assert error <= budget, f"{name}: error {error:.3e} exceeds {budget:.3e}"


def largest_error(actual: Tensor, truth: Tensor) -> float:
    """Largest absolute error of a result of the truth's shape; nan if an entry is nan."""
    return (actual.double() - truth.double()).abs().max().item() if truth.numel() else 0.0


def assert_all_close(
    actual: Mapping[str, Tensor], reference: Mapping[str, Tensor], truth: Mapping[str, Tensor]
) -> None:
    """`assert_close` for every name; the three mappings must have the same names."""
    assert actual.keys() == reference.keys() == truth.keys(), (sorted(actual), sorted(reference), sorted(truth))
    for name in actual:
        assert_close(name, actual[name], reference[name], truth[name])


def assert_equal_up_to_rounding(name: str, actual: Tensor, expected: Tensor, *, roundings: int) -> None:
    """Fail where two results of one dtype differ by more than `roundings` roundings at the scale of the expected one.

    For identities (a projector applied twice, a copy of an expert) where no float64 reference exists; `roundings` is
    the number of rounded operations between the two results, counted in the test that calls this.
    """
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    scale = max(expected.abs().max().item(), torch.finfo(expected.dtype).tiny)
    error = (actual - expected).abs().max().item()
    budget = roundings * torch.finfo(expected.dtype).eps * scale
    assert error <= budget, f"{name}: error {error:.3e} exceeds {budget:.3e} ({roundings} roundings)"
