"""Every way a configuration can be wrong names the key, what it got and what it accepts."""

import dataclasses

import pytest
from hydra.errors import ConfigCompositionException

from configs.schema import Config, load
from configs.typed import ConfigError
from scripts.testbed.launch import compose, explain

DEMO = "experiment=quartet/demo"


def composed(*overrides: str, verb: str = "train") -> Config:
    return load(compose(verb, [DEMO, *overrides]))


def test_the_demo_composes_and_is_frozen() -> None:
    config = composed()
    assert config.moe.enabled
    assert config.bliss.enabled
    assert config.omoe.enabled
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 2  # type: ignore[misc]


@pytest.mark.parametrize("group", ["moe", "omoe", "bliss"])
def test_each_method_is_switched_off_by_one_word(group: str) -> None:
    config = composed(f"{group}=off")
    assert not getattr(config, group).enabled


def test_smoke_shrinks() -> None:
    assert composed("debug=smoke").trainer.max_steps < 10 < composed().trainer.max_steps


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("moe.gate.top_k=9", "top_k"),
        ("moe.gate.num_experts=0", "num_experts"),
        ("moe.pipeline.num_chunks=0", r"moe\.pipeline: num_chunks: got 0; accepted is 1 or more"),
        ("moe.pipeline.restore=S5", r"moe\.pipeline\.restore: got 'S5'"),
        ("moe.expert_ranks=0", "moe: expert_ranks: got 0, accepts 1 or more"),
        ("moe.expert_ranks=3", r"moe: expert_ranks: got 3, accepts a divisor of gate\.num_experts=4"),
        ("moe.expert_ranks=2", r"moe\.expert_ranks: got 2, accepts a divisor of cluster\.num_ranks=1"),
        ("moe.gate.kind=best", r"moe\.gate\.kind: got 'best'"),
        ("moe.layers=[]", "layers: got an empty list"),
        ("trainer.max_steps=many", r"trainer\.max_steps: got 'many' \(str\), accepts an integer"),
        ("trainer.max_steps=0", "max_steps: got 0"),
        ("trainer.save_every=70", "save_every: got 70, accepts a multiple of log_every=50"),
        ("trainer.deepspeed=zero2", "num_ranks=1"),
        ("trainer.threads=0", "threads: got 0"),
        ("model.num_heads=5", "num_heads: got 5, accepts a divisor of d_model=192"),
        ("model.kind=bert", "bliss=off"),
        ("model.dropout=1.0", "dropout: got 1.0"),
        ("bliss.mode=dirty", r"bliss\.mode: got 'dirty'"),
        ("omoe.period=0", "period"),
        ("baselines=[copie]", "did you mean copy"),
        ("+trainer.learning_ratee=1", r"trainer\.learning_ratee: unknown key; .* did you mean learning_rate\?"),
    ],
)
def test_a_value_that_cannot_be_used_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        composed(override)


def test_zero_and_the_orthogonal_optimizer_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match=r"omoe\.enabled: got true with trainer\.deepspeed=zero2; accepts false"):
        composed("trainer.deepspeed=zero2", "cluster=cpu_2ranks")
    assert composed("trainer.deepspeed=zero2", "cluster=cpu_2ranks", "omoe=off").trainer.deepspeed == "zero2"


def test_spread_experts_need_experts() -> None:
    assert composed("moe.expert_ranks=2", "cluster=cpu_2ranks").omoe.enabled
    with pytest.raises(ConfigError, match=r"moe\.expert_ranks: got 2 with moe\.enabled=false; accepts 1, or moe=on"):
        composed("moe.expert_ranks=2", "cluster=cpu_2ranks", "omoe=off", "moe=off")
    with pytest.raises(ConfigError, match=r"pipeline\.num_chunks: got 1 with pipeline\.split=ranks, accepts"):
        composed("moe.expert_ranks=2", "cluster=cpu_2ranks", "omoe=off", "moe.pipeline.split=ranks")
    config = composed("moe.expert_ranks=2", "cluster=cpu_2ranks", "omoe=off", "moe.pipeline.num_chunks=4")
    assert config.moe.pipeline.num_chunks == 4


def test_recording_a_shrunk_run_is_refused() -> None:
    with pytest.raises(ConfigError, match="record: got true with debug=smoke"):
        composed("debug=smoke", "record=true")


def test_the_wrong_verb_is_told_the_right_one() -> None:
    with pytest.raises(ConfigError, match=r"python -m scripts\.train experiment=quartet/demo"):
        composed(verb="bench")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "trainer.learning_ratee=1",
            r"trainer\.learning_ratee: unknown key; trainer accepts .*did you mean learning_rate\?",
        ),
        ("moe.gate.topk=1", r"moe\.gate\.topk: unknown key; moe\.gate accepts .*top_k"),
        ("seeed=1", r"seeed: unknown key; the configuration accepts .*did you mean seed\?"),
        ("moe=offf", "Could not find 'moe/offf'"),
    ],
)
def test_a_typo_on_the_command_line_is_explained(override: str, message: str) -> None:
    with pytest.raises(ConfigCompositionException) as raised:
        composed(override)
    import re

    assert re.search(message, explain(raised.value)), explain(raised.value)
