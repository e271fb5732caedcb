"""States dominate at small batches, activations and buffers at large ones."""

import pytest

from configs.schema import load
from scripts.testbed.benchmarks import moe_fig2
from scripts.testbed.launch import Outcome, Run, compose


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    config = load(compose("bench", ["experiment=moe_pipeline/fig2"]))
    return moe_fig2.bench(config, Run(folder=tmp_path_factory.mktemp("fig2"), rank=0))


def test_states_dominate_small_batches_only(outcome: Outcome) -> None:
    for model in ("MoE-GPT3-S", "MoE-BERT-L", "MoE-GPT3-XL"):
        assert outcome.summary[f"states_share_{model}_256"] > 0.8  # type: ignore[operator]
        assert outcome.summary[f"states_share_{model}_16384"] < 0.25  # type: ignore[operator]


def test_parts_of_the_largest_model(outcome: Outcome) -> None:
    parts = moe_fig2.breakdown("MoE-GPT3-XL", 16384)
    assert parts["activations"] == 16384 * 16384 * 4 / 2**20
    assert round(parts["states"]) == 514
