"""The goals of the figure that the device was fitted on."""

import pytest

from configs.schema import load
from scripts.testbed.benchmarks import moe_fig12
from scripts.testbed.launch import Outcome, Run, compose


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    config = load(compose("bench", ["experiment=moe_pipeline/fig12"]))
    return moe_fig12.bench(config, Run(folder=tmp_path_factory.mktemp("fig12"), rank=0))


def test_the_fifteen_speeds_and_the_five_optima(outcome: Outcome) -> None:
    assert outcome.summary["max_error"] <= 0.05  # type: ignore[operator]
    assert outcome.summary["optimum_matches"] == outcome.summary["optimum_cases"] == 5


def test_the_choice_grows_with_the_batch(outcome: Outcome) -> None:
    chosen = [row.value for row in outcome.rows if row.metric.startswith("chunks_")]
    assert len(chosen) == len(moe_fig12.GRID)
    assert chosen == sorted(chosen)


def test_the_smaller_of_equal_numbers_is_chosen() -> None:
    assert moe_fig12.choice({1: 1.0, 2: 1.1, 4: 1.1}) == 2
