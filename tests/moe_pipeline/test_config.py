import dataclasses

import pytest

from moe_pipeline import GateConfig

REFUSED = {
    "no experts": ({"num_experts": 0}, "num_experts: got 0"),
    "no choices": ({"num_experts": 4, "top_k": 0}, "top_k: got 0"),
    "more choices than experts": ({"num_experts": 2, "top_k": 3}, r"top_k: got 3 with num_experts=2"),
    "unknown kind": ({"num_experts": 4, "kind": "hash"}, "kind: got 'hash'.*expert_choice"),
    "switch with two": ({"num_experts": 4, "kind": "switch", "top_k": 2}, "top_k: got 2.*switch"),
    "gshard with one": (
        {"num_experts": 4, "kind": "gshard", "top_k": 1, "capacity_factor": 1.0},
        "top_k: got 1.*gshard",
    ),
    "gshard, dropless": ({"num_experts": 4, "kind": "gshard"}, "capacity_factor: got None.*gshard"),
    "experts choose without limit": ({"num_experts": 4, "kind": "expert_choice"}, "capacity_factor: got None"),
    "no capacity": ({"num_experts": 4, "capacity_factor": 0.0}, "capacity_factor: got 0.0"),
    "capacity not a number": ({"num_experts": 4, "capacity_factor": float("nan")}, "capacity_factor: got nan"),
    "a single weight always 1": ({"num_experts": 4, "top_k": 1}, "normalize: got True.*normalize=False"),
    "unknown noise": ({"num_experts": 4, "noise": "pink"}, "noise: got 'pink'"),
    "noise without size": ({"num_experts": 4, "noise": "gaussian"}, "noise_std: got 0.0"),
    "size without noise": ({"num_experts": 4, "noise_std": 0.1}, "noise_std: got 0.1"),
    "jitter through zero": ({"num_experts": 4, "noise": "jitter", "noise_std": 1.0}, "noise_std: got 1.0"),
    "learned noise of a Switch": ({"num_experts": 4, "kind": "switch", "top_k": 1, "noise": "learned"}, "noise: got"),
    "negative weight": ({"num_experts": 4, "balance_weight": -1.0}, "balance_weight: got -1.0"),
    "infinite weight": ({"num_experts": 4, "z_weight": float("inf")}, "z_weight: got inf"),
    "weight not a number": ({"num_experts": 4, "importance_weight": float("nan")}, "importance_weight: got nan"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    arguments, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        GateConfig(**arguments)


def test_accepts_every_kind() -> None:
    GateConfig(num_experts=1, top_k=1)
    GateConfig(num_experts=4, top_k=4, noise="learned")
    GateConfig(num_experts=4, top_k=1, normalize=False)
    GateConfig(num_experts=4, top_k=1, kind="switch", noise="jitter", noise_std=0.01)
    GateConfig(num_experts=4, kind="gshard", capacity_factor=2.0)
    GateConfig(num_experts=4, kind="expert_choice", capacity_factor=1.0)


def test_is_a_value() -> None:
    config = GateConfig(num_experts=4)
    assert config == GateConfig(num_experts=4)
    assert hash(config) == hash(GateConfig(num_experts=4))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.top_k = 1  # type: ignore[misc]


def test_capacity_is_a_rounded_up_share() -> None:
    assert GateConfig(num_experts=4).capacity_rows(100) is None
    assert GateConfig(num_experts=4, top_k=2, capacity_factor=1.0).capacity_rows(9) == 5
    assert GateConfig(num_experts=4, top_k=2, capacity_factor=1.5).capacity_rows(8) == 6
    assert GateConfig(num_experts=4, top_k=2, capacity_factor=1.0).capacity_rows(0) == 0
