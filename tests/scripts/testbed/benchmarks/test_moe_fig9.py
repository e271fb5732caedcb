"""Memory over FastMoE: the equations are near the paper, and the runtime needs less."""

import pytest

from configs.schema import load
from scripts.testbed.benchmarks import moe_fig9
from scripts.testbed.launch import Outcome, Run, compose


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    config = load(compose("bench", ["experiment=moe_pipeline/fig9"]))
    return moe_fig9.bench(config, Run(folder=tmp_path_factory.mktemp("fig9"), rank=0))


def test_the_equations_are_near_the_paper(outcome: Outcome) -> None:
    assert outcome.summary["median_error"] < 0.1  # type: ignore[operator]


def test_reuse_takes_least_and_pipelining_most(outcome: Outcome) -> None:
    ratios = moe_fig9.by_equations("MoE-GPT3-XL", 16384)
    assert ratios["MPipeMoE, single buffers"] < ratios["MPipeMoE"] < 1 < ratios["PipeMoE"]


def test_our_pipeline_takes_less_than_our_sequential_layer() -> None:
    ratios = moe_fig9.by_ledger("MoE-GPT3-XL", 16384)
    assert ratios["MPipeMoE"] < ratios["PipeMoE"] < 1
