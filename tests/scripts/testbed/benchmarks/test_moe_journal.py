"""Breakdown and scaling: signs and bounds that hold whatever the speeds are."""

import pytest

from configs.schema import load
from moe_pipeline.plan.device import load_device
from scripts.testbed.benchmarks import moe_journal
from scripts.testbed.launch import Outcome, Run, compose


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    config = load(compose("bench", ["experiment=moe_pipeline/journal"]))
    return moe_journal.bench(config, Run(folder=tmp_path_factory.mktemp("journal"), rank=0))


def test_scaling_is_below_the_ideal(outcome: Outcome) -> None:
    speeds = {row.metric: row.value for row in outcome.rows if row.provider == "MoE-GPT3-XL"}
    assert speeds["speed_1_nodes"] == 1
    assert all(1 < speeds[f"speed_{nodes}_nodes"] < nodes for nodes in (2, 4, 8))


def test_slower_links_scale_worse() -> None:
    device = load_device("a100_hdr")
    assert moe_journal.scaling(moe_journal.with_node_share(device, 0.3), 8) < moe_journal.scaling(device, 8)


def test_splitting_alone_costs_and_overlap_pays(outcome: Outcome) -> None:
    for model in ("MoE-BERT-L", "MoE-GPT3-XL"):
        saved = {row.metric: row.value for row in outcome.rows if row.provider == model}
        assert saved["saved_step_by_splitting"] < 0 < saved["saved_compute_and_messages_by_overlap"]
        assert 0 < float(outcome.summary[f"overlap_efficiency_{model}"] or 0) <= 1


def test_the_second_cluster_reaches_the_first_ones_share_of_its_tensor_cores() -> None:
    first, second = load_device("a100_hdr"), load_device("v100_ib56")
    shares = [first.product.points[0][1] / 312e12, second.product.points[0][1] / 125e12]
    assert round(shares[0], 3) == round(shares[1], 3)
