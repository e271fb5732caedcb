import dataclasses

import torch
from closeness import assert_close, assert_equal_up_to_rounding
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omoe.reference import outside_span
from omoe.subspace import BLOCK, COLUMNS, WeightRows, dot_products, others_coefficients, project, removed_by_span


def steps_and_changes(seed: int, num_experts: int, size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    common_K = torch.randn(size, generator=generator, dtype=torch.float64)
    step_EK = 1e-3 * (torch.randn(num_experts, size, generator=generator, dtype=torch.float64) + common_K)
    return step_EK, torch.randn(num_experts, size, generator=generator, dtype=torch.float64) + 2 * common_K


def by_loop(step_EK: Tensor, change_EK: Tensor) -> Tensor:
    kept = [outside_span(step, [*change_EK[:e], *change_EK[e + 1 :]]) for e, step in enumerate(step_EK)]
    return step_EK - torch.stack(kept)


@given(st.integers(0, 1000), st.integers(2, 6), st.sampled_from([17, 64, BLOCK + 3]))
@settings(max_examples=15, deadline=None)
def test_removes_the_others_span_and_nothing_twice(seed: int, num_experts: int, size: int) -> None:
    step_EK, change_EK = steps_and_changes(seed, num_experts, size)
    removed_EK = removed_by_span(step_EK, change_EK)
    assert_equal_up_to_rounding("reference", removed_EK, by_loop(step_EK, change_EK), roundings=1000 * num_experts)
    kept_EK = step_EK - removed_EK
    lengths_EJ = kept_EK.norm(dim=1)[:, None] * change_EK.norm(dim=1)
    cosine_EJ = (kept_EK @ change_EK.T / lengths_EJ).fill_diagonal_(0)
    assert cosine_EJ.abs().max() < 1000 * torch.finfo(torch.float64).eps
    again_EK = removed_by_span(kept_EK, change_EK)
    assert_equal_up_to_rounding("idempotent", kept_EK - again_EK, kept_EK, roundings=1000)


def test_float32_is_as_good_as_the_reference_in_float32() -> None:
    step_EK, change_EK = steps_and_changes(3, 5, 2 * BLOCK + 11)
    step, change = step_EK.float(), change_EK.float()
    assert_close(
        "removed", removed_by_span(step, change), by_loop(step, change), by_loop(step.double(), change.double())
    )


def test_zero_changes_remove_exactly_nothing() -> None:
    step_EK, _ = steps_and_changes(0, 4, 50)
    assert torch.equal(removed_by_span(step_EK, torch.zeros(4, 50, dtype=torch.float64)), torch.zeros_like(step_EK))


def test_an_experts_own_change_does_not_hold_it_back() -> None:
    change_EK = torch.zeros(3, 40)
    change_EK[1] = torch.randn(40)
    step_EK = change_EK[1].repeat(3, 1)
    removed_EK = removed_by_span(step_EK, change_EK)
    assert torch.equal(removed_EK[1], torch.zeros(40))
    assert_equal_up_to_rounding("others", removed_EK[[0, 2]], step_EK[[0, 2]], roundings=16)


def test_changes_of_very_different_length_span_alike() -> None:
    step_EK, change_EK = steps_and_changes(5, 4, 60)
    scaled_EK = change_EK * torch.tensor([1e-12, 1.0, 1e9, 1e-3], dtype=torch.float64)[:, None]
    removed_EK = removed_by_span(step_EK, change_EK)
    assert_equal_up_to_rounding("scale", removed_by_span(step_EK, scaled_EK), removed_EK, roundings=1000)


def test_equal_changes_count_once() -> None:
    step_EK, change_EK = steps_and_changes(6, 4, 60)
    change_EK[2] = change_EK[1]
    change_EK[3] = -2 * change_EK[1]
    expected_EK = by_loop(step_EK, change_EK)
    assert_equal_up_to_rounding("rank one", removed_by_span(step_EK, change_EK), expected_EK, roundings=1000)


def test_directions_below_the_tolerance_are_dropped() -> None:
    cosine = 1 - 1e-3  # of changes 1 and 2: the Gram matrix has the eigenvalues 1 + cosine and 1 - cosine
    gram_EE = torch.tensor([[1, 0, 0], [0, 1, cosine], [0, cosine, 1]], dtype=torch.float64)
    overlap_EJ = torch.tensor([[7, 3, 1], [0, 0, 0], [0, 0, 0]], dtype=torch.float64)
    mean, difference = 2 / (1 + cosine), 1 / (1 - cosine)
    for tolerance, expected in ((1e-2, [0, mean, mean]), (1e-4, [0, mean + difference, mean - difference])):
        coefficients_EJ = others_coefficients(gram_EE, overlap_EJ, tolerance=tolerance)
        expected_E = torch.tensor(expected, dtype=torch.float64)
        assert_equal_up_to_rounding("coefficients", coefficients_EJ[0], expected_E, roundings=16 * 1000)


def test_changes_that_only_rounding_tells_apart_do_not_blow_up() -> None:
    step_EK, change_EK = steps_and_changes(7, 4, 60)
    step_EK, change_EK = step_EK.float(), change_EK.float()
    change_EK[2] = change_EK[1] * (1 + torch.finfo(torch.float32).eps)
    change_EK[3] = change_EK[1] / 3 * 3
    removed_EK = removed_by_span(step_EK, change_EK)
    only_EK = torch.cat([change_EK[:2], torch.zeros(2, 60)])
    assert_equal_up_to_rounding("first", removed_EK[0], removed_by_span(step_EK, only_EK)[0], roundings=64)


def test_dot_products_of_long_rows_are_accurate() -> None:
    left_EK = torch.rand(2, 50 * BLOCK + 5)
    truth = left_EK.double() @ left_EK.double().T
    assert_equal_up_to_rounding("dot", dot_products(left_EK, left_EK).float(), truth.float(), roundings=8)
    assert dot_products(left_EK, left_EK).dtype == torch.float64
    assert dot_products(torch.zeros(2, 0), torch.zeros(3, 0)).shape == (2, 3)


def test_repeats_bit_for_bit() -> None:
    step_EK, change_EK = steps_and_changes(8, 4, BLOCK + 9)
    removed_EK = removed_by_span(step_EK, change_EK)
    assert torch.equal(removed_by_span(step_EK, change_EK), removed_EK)


def rows_of(seed: int, size: int, kept: list[float | None], dtype: torch.dtype) -> tuple[WeightRows, Tensor]:
    """The weights around a step, and those that the plain path gives."""
    num_experts = len(kept)
    step_EK, change_EK = steps_and_changes(seed, num_experts, size)
    start_EK = torch.randn(num_experts, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    before_EK = (start_EK + change_EK).to(dtype)
    after_EK = before_EK.clone()
    step_EK = step_EK.to(dtype)
    for expert, share in enumerate(kept):
        if share is None:
            step_EK[expert] = 0
        else:
            after_EK[expert] = share * before_EK[expert] + step_EK[expert]
    start_EK = start_EK.to(dtype)
    expected_EK = after_EK - removed_by_span(step_EK, before_EK - start_EK)
    rows = WeightRows(
        start_EK=start_EK,
        rounding_E=torch.zeros(1, dtype=torch.float64),
        before_EK=before_EK,
        after=list(after_EK.split(1)),
        kept_shares=kept,
    )
    return rows, expected_EK


@given(st.integers(0, 1000), st.sampled_from([1, 17, COLUMNS, COLUMNS + 5]))
@settings(max_examples=10, deadline=None)
def test_blocks_give_what_the_plain_path_gives(seed: int, size: int) -> None:
    rows, expected_EK = rows_of(seed, size, [0.9, 0.9, None, 1.0], torch.float64)
    removed_E = project(rows)
    actual_EK = torch.cat(list(rows.after))
    assert_equal_up_to_rounding("weights", actual_EK, expected_EK, roundings=1000)
    assert removed_E[2] == 0


def test_the_share_taken_out_is_what_is_missing() -> None:
    rows, _ = rows_of(3, 500, [1.0, 1.0, 1.0], torch.float64)
    before_EK, after_EK = rows.before_EK.clone(), torch.cat(list(rows.after))
    removed_E = project(rows)
    missing_EK = after_EK - torch.cat(list(rows.after))
    share_E = missing_EK.square().sum(1) / (after_EK - before_EK).square().sum(1)
    assert_equal_up_to_rounding("share", removed_E, share_E, roundings=10_000)


def test_a_change_that_may_be_rounding_spans_nothing() -> None:
    rows, _ = rows_of(5, 300, [1.0, 1.0, 1.0], torch.float64)
    still, _ = rows_of(5, 300, [1.0, 1.0, 1.0], torch.float64)
    rows.before_EK[1] = rows.start_EK[1] + 1e-6
    still.before_EK[1] = still.start_EK[1]
    for both in (rows, still):
        both.after[1][:] = both.before_EK[1] + 1e-3
    rounding_E = torch.full((3,), 300 * 1e-12 * (1 + 1e-3), dtype=torch.float64)
    removed_E, expected_E = project(dataclasses.replace(rows, rounding_E=rounding_E)), project(still)
    assert_equal_up_to_rounding("share", removed_E, expected_E, roundings=2**34)  # the step itself is shorter by 1e-3
    for expert in (0, 2):
        assert torch.equal(rows.after[expert], still.after[expert])


def test_an_expert_that_is_not_a_number_neither_spreads_nor_holds_back() -> None:
    rows, _ = rows_of(4, 300, [1.0, 1.0, 1.0], torch.float64)
    rows.before_EK[0, 7] = torch.nan
    rows.after[0][0, 7] = torch.nan
    untouched_EK = torch.cat(list(rows.after))
    alone, _ = rows_of(4, 300, [1.0, 1.0, 1.0], torch.float64)
    alone.before_EK[0] = alone.start_EK[0]
    removed_E, expected_E = project(rows), project(alone)
    assert torch.equal(torch.cat(list(rows.after))[0].nan_to_num(), untouched_EK[0].nan_to_num())
    for expert in (1, 2):
        assert torch.equal(rows.after[expert], alone.after[expert])
    assert removed_E[0] == 0
    assert torch.equal(removed_E[1:], expected_E[1:])
