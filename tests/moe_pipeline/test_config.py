import dataclasses

import pytest

from moe_pipeline import GateConfig, PipelineConfig

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


REFUSED_PIPELINES = {
    "no chunks": ({"num_chunks": 0}, "num_chunks: got 0; accepted is 1 or more"),
    "negative chunks": ({"num_chunks": -2}, "num_chunks: got -2"),
    "half a chunk": ({"num_chunks": 1.5}, "num_chunks: got 1.5"),
    "a switch for a number": ({"num_chunks": True}, "num_chunks: got True"),
    "unknown strategy": ({"restore": "S5"}, "restore: got 'S5'.*'none', 'S1', 'S2', 'S3', 'S4'"),
    "strategy in lower case": ({"restore": "s1"}, "restore: got 's1'"),
    "unknown split": ({"split": "experts"}, "split: got 'experts'.*'tokens', 'local', 'ranks'"),
    "no time": ({"timeout_s": 0.0}, "timeout_s: got 0.0.*finite number of seconds above 0"),
    "negative time": ({"timeout_s": -1.0}, "timeout_s: got -1.0"),
    "endless": ({"timeout_s": float("inf")}, "timeout_s: got inf"),
    "time not a number": ({"timeout_s": float("nan")}, "timeout_s: got nan"),
}


@pytest.mark.parametrize("case", REFUSED_PIPELINES)
def test_refuses_pipelines(case: str) -> None:
    arguments, message = REFUSED_PIPELINES[case]
    with pytest.raises(ValueError, match=message):
        PipelineConfig(**arguments)


def test_accepts_every_strategy_and_split() -> None:
    for restore in ("none", "S1", "S2", "S3", "S4"):
        for split in ("tokens", "local", "ranks"):
            config = PipelineConfig(num_chunks=8, restore=restore, split=split, overlap=False, timeout_s=0.5)
            assert (config.restore, config.split) == (restore, split)


def test_one_chunk_and_everything_kept_unless_asked_for() -> None:
    config = PipelineConfig()
    assert (config.num_chunks, config.restore, config.overlap, config.split) == (1, "none", True, "tokens")
    assert hash(config) == hash(PipelineConfig())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_chunks = 2  # type: ignore[misc]
