import pytest
import torch
from closeness import assert_equal_up_to_rounding
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omoe.low_rank import appended, error_bound, factors, num_columns, positive_root, removed_by_factors
from omoe.projector import complements, others_share, refreshed, removed_by_others

E, D, OUTPUTS = 3, 24, 5


def means(seed: int, count: int) -> list[Tensor]:
    """Mean inputs with a common part, as experts of one layer see them."""
    generator = torch.Generator().manual_seed(seed)
    common_I = 3 * torch.randn(D, generator=generator, dtype=torch.float64)
    return [common_I + torch.randn(E, D, generator=generator, dtype=torch.float64) for _ in range(count)]


def exact(seen: list[Tensor], alpha: float) -> Tensor:
    projector_EII = torch.eye(D, dtype=torch.float64).repeat(E, 1, 1)
    for mean_EI in seen:
        projector_EII = refreshed(projector_EII, mean_EI[:, :, None], alpha=alpha)
    return projector_EII


def streamed(seen: list[Tensor], rank: int) -> tuple[Tensor, Tensor]:
    columns_EIW = torch.zeros(E, D, num_columns(rank), dtype=torch.float64)
    filled, dropped_E = 0, torch.zeros(E, dtype=torch.float64)
    for mean_EI in seen:
        columns_EIW, filled, dropped_E = appended(columns_EIW, filled, dropped_E, mean_EI[:, :, None], rank=rank)
        assert filled <= num_columns(rank)
    return columns_EIW, dropped_E


def test_nothing_is_lost_as_long_as_there_is_room() -> None:
    seen = means(0, num_columns(4))
    columns_EIW, dropped_E = streamed(seen, rank=4)
    factor_EIW = factors(columns_EIW, alpha=2.0)
    assert not dropped_E.any()
    assert_equal_up_to_rounding("I - P", factor_EIW @ factor_EIW.mT, complements(exact(seen, 2.0)), roundings=1000)


@given(st.integers(0, 1000), st.integers(1, 8), st.sampled_from([0.1, 1.0, 100.0]), st.integers(1, 60))
@settings(max_examples=25, deadline=None)
def test_the_error_keeps_to_its_bound(seed: int, rank: int, alpha: float, count: int) -> None:
    seen = means(seed, count)
    columns_EIW, dropped_E = streamed(seen, rank)
    factor_EIW = factors(columns_EIW, alpha=alpha)
    error_E = torch.linalg.matrix_norm(factor_EIW @ factor_EIW.mT - complements(exact(seen, alpha)), ord=2)
    assert (error_E <= error_bound(dropped_E, alpha=alpha) + 1000 * torch.finfo(torch.float64).eps).all()


def test_the_bound_tells_a_good_rank_from_a_bad_one() -> None:
    seen = means(1, 60)
    bounds = [error_bound(streamed(seen, rank)[1], alpha=100.0).max() for rank in (1, 4, 16)]
    assert bounds[0] > bounds[1] > bounds[2] > 0


def test_steps_lose_what_the_exact_projectors_take_out() -> None:
    seen = means(2, 6)
    tokens_E = torch.tensor([3, 0, 9])
    step_EOI = torch.randn(E, OUTPUTS, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    factor_EIW = factors(streamed(seen, 8)[0], alpha=1.0)
    for combine in ("mean", "load"):
        share_EJ = others_share(tokens_E, combine=combine)  # type: ignore[arg-type]
        expected_EOI = removed_by_others(step_EOI, exact(seen, 1.0), tokens_E, combine=combine)  # type: ignore[arg-type]
        actual_EOI = removed_by_factors(step_EOI, factor_EIW, share_EJ)
        assert_equal_up_to_rounding(combine, actual_EOI, expected_EOI, roundings=1000)


def test_without_inputs_exactly_nothing_is_taken_out() -> None:
    factor_EIW = factors(torch.zeros(E, D, 10), alpha=1.0)
    assert not removed_by_factors(torch.randn(E, OUTPUTS, D), factor_EIW, torch.ones(E, E)).any()


def test_columns_that_depend_on_each_other_are_no_obstacle_at_a_tiny_alpha() -> None:
    columns_EIW = torch.randn(2, 30, 3, generator=torch.Generator().manual_seed(0))
    many_EIW = torch.cat([columns_EIW, columns_EIW * 1e3, columns_EIW.flip(2)], dim=2)
    factor_EIW = factors(many_EIW, alpha=1e-8)
    kept_EIW = columns_EIW - factor_EIW @ (factor_EIW.mT @ columns_EIW)
    assert kept_EIW.norm() < 1e-2 * columns_EIW.norm()


def test_roots_are_choleskys_unless_rounding_has_left_them_none() -> None:
    inner_EWW = torch.eye(2).repeat(3, 1, 1)
    assert torch.equal(positive_root(inner_EWW, torch.ones(3)), torch.linalg.cholesky(inner_EWW))
    inner_EWW[1, 1, 1] = -1e-6
    root_EWW = positive_root(inner_EWW, torch.ones(3))
    assert torch.equal(root_EWW[[0, 2]], torch.linalg.cholesky(inner_EWW[[0, 2]]))
    assert_equal_up_to_rounding("nearly", root_EWW[1] @ root_EWW[1].T, inner_EWW[1], roundings=1024)
    inner_EWW[1, 1, 1] = -1.0
    with pytest.raises(RuntimeError, match="positive-definite"):
        positive_root(inner_EWW, torch.ones(3))
