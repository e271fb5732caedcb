"""Predicted speeds are in the paper's order, and what is the paper's is labelled so."""

import pytest

from configs.schema import load
from scripts.testbed.benchmarks import moe_fig8
from scripts.testbed.launch import Outcome, Run, compose


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    config = load(compose("bench", ["experiment=moe_pipeline/fig8"]))
    return moe_fig8.bench(config, Run(folder=tmp_path_factory.mktemp("fig8"), rank=0))


def speeds(outcome: Outcome, provider: str) -> list[float]:
    return [row.value for row in outcome.rows if row.provider == provider]


def test_nine_cases_of_every_method_and_of_the_paper(outcome: Outcome) -> None:
    for name in ("FasterMoE", "PipeMoE n=1", "PipeMoE", "MPipeMoE"):
        assert len(speeds(outcome, name)) == len(speeds(outcome, f"{name}, paper")) == 9
    assert outcome.kind == "simulated"
    assert {row.kind for row in outcome.rows if row.provider.endswith("paper")} == {"paper"}


def test_reuse_costs_time_and_tensor_cores_pay(outcome: Outcome) -> None:
    pipe, reuse, faster = (speeds(outcome, name) for name in ("PipeMoE", "MPipeMoE", "FasterMoE"))
    assert all(a >= b for a, b in zip(pipe, reuse, strict=True))
    assert all(a > b for a, b in zip(pipe, faster, strict=True))
