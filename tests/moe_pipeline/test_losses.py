import pytest
import torch
from closeness import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_pipeline import GateConfig
from moe_pipeline.gate import assign
from moe_pipeline.losses import RouterLosses, balance_loss, smooth_load, squared_variation, z_loss
from moe_pipeline.reference import router_losses

CONFIGS = {
    "top-1": GateConfig(num_experts=5, top_k=1, normalize=False),
    "top-3": GateConfig(num_experts=5, top_k=3),
    "raw weights": GateConfig(num_experts=5, top_k=2, normalize=False),
    "capacity": GateConfig(num_experts=5, top_k=2, capacity_factor=0.5),
    "switch": GateConfig(num_experts=5, top_k=1, kind="switch"),
    "gshard": GateConfig(num_experts=5, top_k=2, kind="gshard", capacity_factor=1.0),
    "expert choice": GateConfig(num_experts=5, kind="expert_choice", capacity_factor=1.0),
    "one expert": GateConfig(num_experts=1, top_k=1),
}


def _gradient(loss: Tensor, logits_TE: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logits_TE, retain_graph=True, materialize_grads=True)[0]


@pytest.mark.parametrize("num_tokens", [1, 2, 23])
@pytest.mark.parametrize("name", CONFIGS)
def test_losses_and_gradients_equal_the_reference(name: str, num_tokens: int) -> None:
    config = CONFIGS[name]
    logits_TE = torch.randn(num_tokens, config.num_experts, requires_grad=True)
    truth_TE = logits_TE.detach().double().requires_grad_()
    losses = assign(logits_TE, config=config).losses
    reference, truth = router_losses(logits_TE, config), router_losses(truth_TE, config)
    for loss in ("balance", "z", "importance"):
        actual = getattr(losses, loss)
        assert_close(loss, actual, reference[loss], truth[loss])
        gradients = [_gradient(*pair) for pair in ((actual, logits_TE), (reference[loss], logits_TE))]
        scale_truth = _gradient(truth[loss], truth_TE)
        if name in ("expert choice", "one expert") and loss != "z":  # zero up to cancellation
            scale_truth, gradients = scale_truth + 1, [gradient + 1 for gradient in gradients]
        assert_close(f"gradient of {loss}", gradients[0], gradients[1], scale_truth)


def test_losses_of_no_tokens_are_zero_and_differentiable() -> None:
    for config in CONFIGS.values():
        logits_TE = torch.randn(0, config.num_experts, requires_grad=True)
        losses = assign(logits_TE, config=config).losses
        assert (losses.balance, losses.z, losses.importance) == (0, 0, 0)
        losses.total(config).backward()


def test_balance_is_one_when_even_and_the_number_of_experts_when_collapsed() -> None:
    even = balance_loss(torch.full((8, 4), 0.25), torch.arange(8) % 4)
    collapsed = balance_loss(torch.eye(4)[:1].expand(8, 4), torch.zeros(8, dtype=torch.int64))
    assert even == 1
    assert collapsed == 4


def test_z_loss_of_shifted_logits() -> None:
    """Logits whose denominator is 1 cost nothing; shifting them by s costs s squared."""
    logits_TE = torch.randn(7, 4, dtype=torch.float64).log_softmax(-1)
    assert_close("z", z_loss(logits_TE + 3), torch.tensor(9.0).double(), torch.tensor(9.0).double())


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0.0, 100.0, width=32), min_size=1, max_size=8), st.integers(1, 10))
def test_variation_ignores_the_unit_and_the_order(amounts: list[float], unit: int) -> None:
    amount_E = torch.tensor(amounts, dtype=torch.float64) + 1
    variation = squared_variation(amount_E)
    assert variation >= 0
    assert_close("unit", 1 + squared_variation(amount_E * unit), 1 + variation, 1 + variation)
    assert_close("order", 1 + squared_variation(amount_E.flip(0)), 1 + variation, 1 + variation)
    assert squared_variation(torch.full_like(amount_E, amounts[0])) == 0


def test_smooth_load_is_the_mean_of_sampled_loads() -> None:
    """Redraw the noise of one expert many times; the smooth load is the expected count."""
    clean_TE = torch.randn(3, 4, dtype=torch.float64)
    std_TE = torch.rand(3, 4, dtype=torch.float64) + 0.5
    noisy_TE = clean_TE + std_TE * torch.randn_like(std_TE)
    expected_E = torch.zeros(4, dtype=torch.float64)
    draws = 20_000
    for expert in range(4):
        redrawn_DTE = noisy_TE.repeat(draws, 1, 1)
        redrawn_DTE[:, :, expert] = clean_TE[:, expert] + std_TE[:, expert] * torch.randn(draws, 3).double()
        expected_E[expert] = (redrawn_DTE.topk(2).indices == expert).sum() / draws
    load_E = smooth_load(clean_TE, noisy_TE, std_TE, top_k=2)
    six_deviations = 6 * (3 * 0.25 / draws) ** 0.5  # of a mean of three counts with at most variance 1/4 each
    assert (load_E - expected_E).abs().max() < six_deviations


def test_smooth_load_when_every_expert_is_chosen() -> None:
    logits_TE = torch.randn(3, 4)
    assert smooth_load(logits_TE, logits_TE, torch.ones(3, 4), top_k=4).tolist() == [3, 3, 3, 3]


def test_total_weighs_each_loss() -> None:
    losses = RouterLosses(balance=torch.tensor(2.0), z=torch.tensor(3.0), importance=torch.tensor(5.0))
    config = GateConfig(num_experts=4, balance_weight=1.0, z_weight=10.0, importance_weight=100.0)
    assert losses.total(config) == 532
