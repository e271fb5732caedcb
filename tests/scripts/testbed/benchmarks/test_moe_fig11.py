"""Points of memory and time: more tokens take more memory and less time each."""

import pytest

from configs.schema import load
from moe_pipeline.plan.device import load_device
from scripts.testbed.benchmarks import moe_fig11
from scripts.testbed.launch import Outcome, Run, compose


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    config = load(compose("bench", ["experiment=moe_pipeline/fig11"]))
    return moe_fig11.bench(config, Run(folder=tmp_path_factory.mktemp("fig11"), rank=0))


def test_memory_is_near_the_paper(outcome: Outcome) -> None:
    assert outcome.summary["median_memory_error"] < 0.1  # type: ignore[operator]


def test_more_tokens_take_more_memory_and_less_time_each() -> None:
    for own in moe_fig11.points(load_device("a100_hdr")).values():
        assert list(own) == sorted(own)
        assert [time for _, time in own] == sorted((time for _, time in own), reverse=True)
