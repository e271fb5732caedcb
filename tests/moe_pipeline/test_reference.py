"""The reference against numbers worked out by hand."""

import math

import torch
from closeness import assert_equal_up_to_rounding

from moe_pipeline import GateConfig
from moe_pipeline.reference import chosen_entries, kept_entries, moe_layer, router_losses

LOGITS_TE = torch.tensor([[0.5, 0.25, 0.25 - 1e-9], [0.125, 0.75, 0.125 - 1e-9]], dtype=torch.float64).log()
EXPERTS = [lambda x: x, lambda x: 10 * x, lambda x: 100 * x]


def _summary(logits_TE: torch.Tensor, config: GateConfig, **options: list[float]) -> list[tuple[int, int, float]]:
    entries = kept_entries(logits_TE, config, **options)
    return [(entry.token, entry.expert, round(entry.weight.item(), 6)) for entry in entries]


def test_top_k() -> None:
    raw = GateConfig(num_experts=3, normalize=False)
    assert _summary(LOGITS_TE, raw) == [(0, 0, 0.5), (1, 1, 0.75), (0, 1, 0.25), (1, 0, 0.125)]
    scaled = GateConfig(num_experts=3)
    assert _summary(LOGITS_TE, scaled) == [(0, 0, 0.666667), (1, 1, 0.857143), (0, 1, 0.333333), (1, 0, 0.142857)]


def test_switch_with_capacity() -> None:
    config = GateConfig(num_experts=3, top_k=1, kind="switch", capacity_factor=1.0)
    assert _summary(LOGITS_TE[[0, 0]], config) == [(0, 0, 0.5)]


def test_gshard() -> None:
    config = GateConfig(num_experts=3, kind="gshard", capacity_factor=1.5)
    draws = [0.66, 0.3]  # below and above twice 1/3 and 1/7
    assert _summary(LOGITS_TE, config, draws=draws) == [(0, 0, 0.666667), (1, 1, 0.857143), (0, 1, 0.333333)]


def test_expert_choice() -> None:
    config = GateConfig(num_experts=3, top_k=1, kind="expert_choice", capacity_factor=1.0, normalize=False)
    assert _summary(LOGITS_TE, config) == [(0, 0, 0.5), (1, 1, 0.75), (0, 2, 0.25)]
    assert len(chosen_entries(LOGITS_TE, config)) == 3


def test_layer() -> None:
    x_TM = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    y_TM = moe_layer(x_TM, LOGITS_TE, GateConfig(num_experts=3), EXPERTS)
    by_hand_TM = torch.tensor([[2 / 3 + 10 / 3], [2 * (60 / 7 + 1 / 7)]], dtype=torch.float64)
    assert_equal_up_to_rounding("y", y_TM, by_hand_TM, roundings=8)
    assert moe_layer(x_TM[:0], LOGITS_TE[:0], GateConfig(num_experts=3), EXPERTS).shape == (0, 1)


def test_losses() -> None:
    logits_TE = torch.tensor([[math.log(3.0), 0.0], [math.log(3.0), 0.0]], dtype=torch.float64)
    losses = router_losses(logits_TE, GateConfig(num_experts=2, top_k=1, normalize=False))
    assert_equal_up_to_rounding("balance", losses["balance"], torch.tensor(1.5, dtype=torch.float64), roundings=4)
    assert_equal_up_to_rounding("z", losses["z"], torch.tensor(math.log(4.0) ** 2, dtype=torch.float64), roundings=4)
    assert_equal_up_to_rounding("importance", losses["importance"], torch.tensor(1.0, dtype=torch.float64), roundings=4)
