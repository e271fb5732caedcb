import pytest
import torch
from closeness import assert_all_close, assert_close, assert_equal_up_to_rounding
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from omoe import OMoEConfig
from omoe.config import Combine
from omoe.projector import others_share, refreshed, removed_by_others, seen_means, symmetrised, trace_share
from omoe.reference import ReferenceOMoE, owm

E, D, STEPS = 3, 7, 5


def mean_inputs(seed: int, *, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(STEPS, E, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def run(means_SEI: Tensor, combine: Combine, alpha: float) -> Tensor:
    projector_EII = torch.eye(D, dtype=means_SEI.dtype).repeat(E, 1, 1)
    for mean_EI in means_SEI:
        projector_EII = refreshed(projector_EII, seen_means(mean_EI, combine=combine), alpha=alpha)
    return projector_EII


def closed_form(inputs_MI: Tensor, alpha: float) -> Tensor:
    a_IM = inputs_MI.T
    inner_MM = a_IM.T @ a_IM + alpha * torch.eye(a_IM.shape[1], dtype=a_IM.dtype)
    return torch.eye(a_IM.shape[0], dtype=a_IM.dtype) - a_IM @ torch.linalg.inv(inner_MM) @ a_IM.T


@pytest.mark.parametrize("combine", ["mean", "union"])
@given(seed=st.integers(0, 1000), alpha=st.sampled_from([0.1, 1.0, 100.0]))
@settings(max_examples=20, deadline=None)
def test_recursion_is_the_closed_form_and_a_projector(combine: Combine, seed: int, alpha: float) -> None:
    means_SEI = mean_inputs(seed)
    projector_EII = run(means_SEI, combine, alpha)
    for expert in range(E):
        seen = [expert] if combine == "mean" else [other for other in range(E) if other != expert]
        expected_II = closed_form(means_SEI[:, seen].flatten(0, 1), alpha)
        assert_equal_up_to_rounding("closed form", projector_EII[expert], expected_II, roundings=64 * STEPS * D)
    slack = 64 * D * torch.finfo(torch.float64).eps
    assert_equal_up_to_rounding("symmetric", projector_EII, projector_EII.mT, roundings=4)
    values = torch.linalg.eigvalsh(projector_EII)
    assert values.min() > -slack
    assert values.max() < 1 + slack


def test_recursion_equals_owm_in_float32() -> None:
    def by_loop(dtype: torch.dtype) -> dict[str, Tensor]:
        result = {}
        for expert in range(E):
            projector_II = torch.eye(D, dtype=dtype)
            for mean_EI in mean_inputs(1, dtype=dtype):
                projector_II = owm(projector_II, mean_EI[expert], 1.0)
            result[str(expert)] = projector_II
        return result

    actual_EII = run(mean_inputs(1, dtype=torch.float32), "mean", 1.0)
    actual = {str(expert): actual_EII[expert] for expert in range(E)}
    assert_all_close(actual, by_loop(torch.float32), by_loop(torch.float64))


def test_an_expert_without_tokens_keeps_its_projector_bit_for_bit() -> None:
    before_EII = run(mean_inputs(2, dtype=torch.float32), "mean", 1.0)
    mean_EI = mean_inputs(3, dtype=torch.float32)[0]
    mean_EI[1] = 0
    after_EII = refreshed(before_EII, seen_means(mean_EI, combine="mean"), alpha=1.0)
    assert torch.equal(after_EII[1], before_EII[1])
    assert not torch.equal(after_EII[0], before_EII[0])


@pytest.mark.parametrize("combine", ["mean", "load", "union"])
def test_others_projector_is_the_references(combine: Combine) -> None:
    tokens = [5, 0, 11]
    removed: dict[torch.dtype, Tensor] = {}
    by_loop: dict[torch.dtype, Tensor] = {}
    for dtype in (torch.float32, torch.float64):
        config = OMoEConfig(space="input", combine=combine, alpha=2.0)
        reference = ReferenceOMoE([torch.zeros(2, D, dtype=dtype)] * E, lambda e, g, t: g, 0.0, config)
        projector_EII = torch.eye(D, dtype=dtype).repeat(E, 1, 1)
        for mean_EI in mean_inputs(4, dtype=dtype):
            mean_EI[1] = 0
            reference.step(
                [torch.zeros(2, D, dtype=dtype)] * E, [r.expand(n, D) for r, n in zip(mean_EI, tokens, strict=True)]
            )
            projector_EII = refreshed(projector_EII, seen_means(mean_EI, combine=combine), alpha=2.0)
        eye_EII = torch.eye(D, dtype=dtype).repeat(E, 1, 1)
        removed[dtype] = removed_by_others(eye_EII, projector_EII, torch.tensor(tokens), combine=combine)
        by_loop[dtype] = torch.stack([torch.eye(D, dtype=dtype) - reference.others_projector(e) for e in range(E)])
        own_E = projector_EII.diagonal(dim1=1, dim2=2).double().mean(1)
        trace_E = trace_share(own_E, torch.tensor(tokens), combine=combine)
        expected_E = torch.stack([reference.others_projector(e).double().trace() / D for e in range(E)])
        assert_equal_up_to_rounding("trace", trace_E.to(dtype), expected_E.to(dtype), roundings=8 * D)
    assert_close(combine, removed[torch.float32], by_loop[torch.float32], by_loop[torch.float64])


@example([0, 0, 0], "load")
@example([5, 0], "load")
@given(st.lists(st.integers(0, 10**9), min_size=2, max_size=6), st.sampled_from(["mean", "load"]))
def test_shares_sum_to_one_and_leave_the_expert_itself_out(tokens: list[int], combine: Combine) -> None:
    share_EJ = others_share(torch.tensor(tokens), combine=combine)
    assert (share_EJ.diagonal() == 0).all()
    assert_equal_up_to_rounding("sum", share_EJ.sum(1), torch.ones(len(tokens), dtype=torch.float64), roundings=8)
    if combine == "load" and sum(tokens[1:]) > 0:
        expected = torch.tensor(tokens[1:], dtype=torch.float64) / sum(tokens[1:])
        assert_equal_up_to_rounding("load", share_EJ[0, 1:], expected, roundings=4)


@pytest.mark.parametrize("combine", ["mean", "load", "union"])
def test_identity_projectors_remove_exactly_nothing(combine: Combine) -> None:
    eye_EII = torch.eye(D).repeat(E, 1, 1)
    removed_EII = removed_by_others(torch.randn(E, D, D), eye_EII, torch.tensor([3, 5, 11]), combine=combine)
    assert torch.equal(removed_EII, torch.zeros(E, D, D))


def test_symmetrised_is_symmetric_and_idempotent() -> None:
    once_EII = symmetrised(torch.randn(E, D, D))
    assert torch.equal(once_EII, once_EII.mT)
    assert torch.equal(symmetrised(once_EII), once_EII)


def test_an_alpha_that_rounding_drowns_is_named() -> None:
    means_SEI = torch.cat([mean_inputs(seed, dtype=torch.float32) for seed in range(60)]) + 1
    with pytest.raises(RuntimeError, match=r"alpha=1e-08: torch\.float32 cannot hold .*raise alpha, or set a rank"):
        run(means_SEI, "union", 1e-8)
    assert run(means_SEI, "union", 1e-2).isfinite().all()
