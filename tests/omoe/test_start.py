import pytest
import torch
from closeness import assert_equal_up_to_rounding
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omoe.start import LARGEST, changes, kept_start, rounding_E, start_bytes, start_EOI

WEIGHTS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def steps_of(weight_EOI: Tensor) -> Tensor:
    """2^-23 of the power of two above each row's largest weight, by Python's own arithmetic."""
    steps = []
    for largest in weight_EOI.abs().amax(2).flatten().tolist():
        exponent = -149 if largest == 0 else max(-149, int(largest.hex().partition("p")[2]) + 1 - 23)
        steps.append(2.0**exponent)
    return torch.tensor(steps, dtype=torch.float64).view(*weight_EOI.shape[:2], 1)


@given(st.lists(st.lists(WEIGHTS, min_size=3, max_size=3), min_size=1, max_size=4))
@settings(max_examples=200, deadline=None)
def test_what_is_read_back_is_the_nearest_multiple_of_the_rows_step(rows: list[list[float]]) -> None:
    weight_EOI = torch.tensor([rows], dtype=torch.float32)
    kept = kept_start(weight_EOI)
    step_EO1 = steps_of(weight_EOI)
    assert torch.equal(kept["start_step_EO1"].double(), step_EO1)
    nearest_EOI = (weight_EOI.double() / step_EO1).round().clamp(-LARGEST, LARGEST) * step_EO1
    assert torch.equal(start_EOI(kept).double(), nearest_EOI)
    error_EOI = (start_EOI(kept).double() - weight_EOI.double()).abs()
    assert (error_EOI <= step_EO1 / 2).all()
    assert (error_EOI <= (weight_EOI.double().abs().amax(2, keepdim=True) * 2**-23).clamp(min=2.0**-150)).all()
    assert (changes(weight_EOI, kept) == 0).all()


@given(st.integers(0, 1000), st.sampled_from([1e-44, 1e-30, 1.0, 1e30, 3e38]))
@settings(max_examples=40, deadline=None)
def test_keeping_what_was_read_back_changes_nothing(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight_EOI = ((torch.rand(2, 3, 5, generator=generator, dtype=torch.float64) * 2 - 1) * scale).float()
    once_EOI = start_EOI(kept_start(weight_EOI))
    assert torch.equal(start_EOI(kept_start(once_EOI)), once_EOI)
    assert torch.equal(start_EOI(kept_start(-weight_EOI)), -once_EOI)


def test_weights_drawn_as_a_network_does_are_nearly_exact() -> None:
    weight_EOI = torch.randn(1, 64, 512, generator=torch.Generator().manual_seed(0)) * 0.04
    error = (start_EOI(kept_start(weight_EOI)) - weight_EOI).norm() / weight_EOI.norm()
    assert error < 2**-21  # 24 bits with an exponent of eight err by more than 2^-19


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_is_read_back_as_nan_and_no_other(broken: float) -> None:
    weight_EOI = torch.randn(2, 3, 4)
    weight_EOI[1, 2, 0] = broken
    found_EOI = start_EOI(kept_start(weight_EOI))
    assert found_EOI[1, 2].isnan().all()
    assert found_EOI[0].isfinite().all()
    assert found_EOI[1, :2].isfinite().all()


def test_zeros_are_zeros_and_the_smallest_weights_are_kept() -> None:
    weight_EOI = torch.zeros(1, 3, 4)
    weight_EOI[0, 1] = torch.tensor([1e-45, -3e-42, 1e-39, 0.0])
    assert torch.equal(start_EOI(kept_start(weight_EOI)), weight_EOI)


def test_other_dtypes_are_kept_as_they_are() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        weight_EOI = torch.randn(2, 3, 4).to(dtype)
        kept = kept_start(weight_EOI)
        assert list(kept) == ["start_EOI"]
        assert torch.equal(start_EOI(kept), weight_EOI)
        assert kept["start_EOI"].data_ptr() != weight_EOI.data_ptr()
        assert not rounding_E(kept).any()
        assert start_bytes(dtype, 3, 4) * 2 == kept["start_EOI"].nbytes


def test_sizes() -> None:
    kept = kept_start(torch.randn(2, 5, 7))
    assert start_bytes(torch.float32, 5, 7) * 2 == sum(tensor.nbytes for tensor in kept.values())


def test_changes_are_exact_differences_and_rounding_is_none() -> None:
    start, step = torch.randn(1, 6, 8), torch.randn(3, 6, 8)
    kept = kept_start(start)
    weight_EOI = start + 1e-3 * step
    weight_EOI[1] = start[0]
    change_EOI = changes(weight_EOI, kept)
    assert not change_EOI[1].any()
    for expert in (0, 2):
        assert torch.equal(change_EOI[expert], weight_EOI[expert] - start_EOI(kept)[0])
    rounded = (start - start_EOI(kept)).double().square().sum()
    assert 0 < rounded <= rounding_E(kept)[0]
    largest = start.double().abs().amax(2).square().sum() * 8 * 2**-46
    assert rounding_E(kept)[0] <= largest
    assert_equal_up_to_rounding("difference", change_EOI[0], 1e-3 * step[0], roundings=2**14)
