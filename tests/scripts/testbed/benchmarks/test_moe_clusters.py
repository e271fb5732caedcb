"""The what-if for clusters: its choices are the selector's, its limit and its frontier are what they say."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.schema import load
from configs.sections import ClustersSection
from configs.typed import ConfigError
from moe_pipeline.config import PipelineConfig
from moe_pipeline.plan.budget import Budget, Footprint
from moe_pipeline.plan.device import Device, Speed, device_json
from moe_pipeline.plan.ledger import ledger
from moe_pipeline.plan.selector import Candidate, candidates, select
from scripts.testbed.benchmarks.moe_clusters import (
    Case,
    bench,
    frontier,
    hidable_up_to_ranks,
    layer_shape,
    with_node_rate,
    with_peer_latency,
)
from scripts.testbed.launch import Outcome, Run, compose
from tests.moe_pipeline.machine import machine

CLUSTER = machine(
    name="lab",
    product=Speed(2.0, ((1.0, 1e9),)),
    message=Speed(5.0, ((1.0, 1e9),)),
    node_message=Speed(8.0, ((1e3, 1e8), (1e6, 5e8))),
    rows=Speed(1.0, ((1.0, 1e11),)),
    copy=Speed(3.0, ((1.0, 1e9),)),
    peer_us=0.1,
)
SMALL = ["bench.clusters.model=null", "bench.clusters.d_model=16", "bench.clusters.d_hidden=64",
         "bench.clusters.num_tokens=2048", "bench.clusters.ranks=[1,4,32]",
         "bench.clusters.device_budget_bytes=null", "bench.clusters.host_budget_bytes=null"]  # fmt: skip


@pytest.fixture
def simulate(tmp_path: Path) -> Callable[..., Outcome]:
    """Run the experiment, small, on devices that are written to files first."""

    def run(*overrides: str, devices: tuple[Device, ...] = (CLUSTER,)) -> Outcome:
        paths = [tmp_path / f"{device.name}.json" for device in devices]
        for path, device in zip(paths, devices, strict=True):
            path.write_text(device_json(device), encoding="utf-8")
        named = f"bench.clusters.devices=[{','.join(map(str, paths))}]"
        config = load(compose("bench", ["experiment=moe_pipeline/clusters", named, *SMALL, *overrides]))
        return bench(config, Run(folder=tmp_path, rank=0))

    return run


def _figures(outcome: Outcome, provider: str) -> dict[str, float]:
    return {row.metric: row.value for row in outcome.rows if row.provider == provider}


def test_each_number_of_ranks_has_the_selectors_choice_and_the_ledgers_memory(
    simulate: Callable[..., Outcome],
) -> None:
    outcome = simulate("bench.clusters.device_budget_bytes=1000000", "bench.clusters.host_budget_bytes=200000")
    assert outcome.kind == "simulated"
    budget = Budget(device_bytes=1000000, host_bytes=200000)
    section = ClustersSection(model=None, d_model=16, d_hidden=64, num_tokens=2048, ranks=(1, 4, 32))
    figures = _figures(outcome, "lab")
    for num_ranks in (1, 4, 32):
        shape = layer_shape(section, num_ranks)
        assert (shape.num_experts, shape.num_ranks, shape.tokens) == (num_ranks, num_ranks, 2048)
        chosen = select(candidates(shape, CLUSTER, budget=budget), budget)
        account = ledger(shape, PipelineConfig(num_chunks=chosen.num_chunks, restore=chosen.restore))
        assert account.activation_bytes <= 1000000
        assert figures[f"step_time_{num_ranks}"] == chosen.predicted_us / 1e3
        assert figures[f"device_memory_{num_ranks}"] == account.activation_bytes / 2**20
        assert figures[f"host_memory_{num_ranks}"] == account.host_bytes / 2**20
        assert figures[f"num_chunks_{num_ranks}"] == chosen.num_chunks
        assert f"S{figures[f'strategy_{num_ranks}']:.0f}".replace("S0", "none") == chosen.restore
        assert 0 <= figures[f"exposed_share_{num_ranks}"] < 1
    assert figures["exposed_share_1"] == 0
    assert outcome.summary["lab_step_ms_32"] == figures["step_time_32"]
    assert outcome.summary["lab_exposed_share_32"] == figures["exposed_share_32"]


def test_devices_stand_side_by_side(simulate: Callable[..., Outcome]) -> None:
    slow = replace(CLUSTER, name="slow", product=Speed(2.0, ((1.0, 1e8),)))
    outcome = simulate(devices=(CLUSTER, slow))
    assert _figures(outcome, "slow")["step_time_4"] > _figures(outcome, "lab")["step_time_4"]
    assert [section.title for section in outcome.sections][1:] == ["lab", "slow"]
    assert all(section.plots for section in outcome.sections)


def test_messages_are_hidable_up_to_the_last_rank_on_a_perfect_link_and_to_one_node_on_a_poor_one(
    simulate: Callable[..., Outcome],
) -> None:
    perfect = Speed(0.0, ((1.0, 1e15),))
    fast = replace(CLUSTER, message=perfect, node_message=perfect, peer_us=0.0)
    assert simulate(devices=(fast,)).summary["lab_hidable_up_to_ranks"] == 32
    poor = replace(fast, node_message=Speed(0.0, ((1.0, 1e6),)))
    assert simulate(devices=(poor,)).summary["lab_hidable_up_to_ranks"] == 4, "8 ranks share a node"


def test_the_link_between_nodes_can_be_another(simulate: Callable[..., Outcome]) -> None:
    own, better, worse = (
        _figures(outcome, next(row.provider for row in outcome.rows))
        for outcome in (simulate(), simulate("bench.clusters.node_gbit=400"), simulate("bench.clusters.node_gbit=0.1"))
    )
    assert better["step_time_32"] < own["step_time_32"] < worse["step_time_32"]
    assert better["step_time_4"] == own["step_time_4"] == worse["step_time_4"], "one node has no link between nodes"


def test_every_rank_may_add_latency(simulate: Callable[..., Outcome]) -> None:
    own, slower = (
        _figures(outcome, next(row.provider for row in outcome.rows))
        for outcome in (simulate(), simulate("bench.clusters.peer_us=100"))
    )
    assert slower["step_time_1"] == own["step_time_1"]
    assert slower["step_time_32"] > own["step_time_32"]
    changed = with_peer_latency(CLUSTER, 100.0)
    assert (changed.name, changed.peer_us) == ("lab_100us", 100.0)
    assert replace(changed, name="lab", origin=CLUSTER.origin, peer_us=CLUSTER.peer_us) == CLUSTER


def test_another_link_keeps_the_shape_of_the_files_curve() -> None:
    changed = with_node_rate(CLUSTER, 16.0)
    assert changed.node_message == Speed(8.0, ((1e3, 4e8), (1e6, 2e9)))  # 16 Gbit/s are 2e9 bytes/s
    assert changed.name == "lab_16gbit"
    assert "16 Gbit/s" in changed.origin
    assert changed.origin.startswith(CLUSTER.origin)
    assert replace(changed, name="lab", origin=CLUSTER.origin, node_message=CLUSTER.node_message) == CLUSTER


def _candidate(device_bytes: int, predicted_us: float) -> Candidate:
    footprint = Footprint(num_chunks=1, restore="none", device_bytes=device_bytes, host_bytes=0)
    return Candidate(footprint=footprint, predicted_us=predicted_us, equation_10_us=0.0, phases_us=0.0)


@given(st.lists(st.builds(_candidate, st.integers(0, 6), st.integers(0, 6)), max_size=12))
def test_the_frontier_is_what_nothing_else_beats(found: list[Candidate]) -> None:
    best = frontier(found)

    def beats(one: Candidate, other: Candidate) -> bool:
        mine, others = ((o.footprint.device_bytes, o.predicted_us) for o in (one, other))
        return mine != others and mine[0] <= others[0] and mine[1] <= others[1]

    assert not any(beats(one, other) for one in found for other in best)
    for one in found:
        same = [(o.footprint.device_bytes, o.predicted_us) for o in best]
        assert (one.footprint.device_bytes, one.predicted_us) in same or any(beats(other, one) for other in best)
    for one, other in pairwise(best):
        assert one.footprint.device_bytes < other.footprint.device_bytes
        assert one.predicted_us > other.predicted_us


def test_the_frontier_of_a_run_keeps_to_the_host_budget_and_holds_the_fastest(
    simulate: Callable[..., Outcome],
) -> None:
    outcome = simulate("bench.clusters.host_budget_bytes=0")
    points = [row for row in outcome.rows if row.metric == "frontier_time_32"]
    assert points
    assert all(row.provider.endswith(("none", "S4")) for row in points), "what copies needs host memory"
    section = ClustersSection(model=None, d_model=16, d_hidden=64, num_tokens=2048, ranks=(1, 4, 32))
    found = candidates(layer_shape(section, 32), CLUSTER, budget=Budget(host_bytes=0))
    assert min(row.value for row in points) == min(one.predicted_us for one in found if not one.missing) / 1e3


@pytest.mark.parametrize(
    ("shares", "limit"),
    [([0.0, 0.01, 0.2], 2), ([0.0, 0.2, 0.049], 4), ([0.05, 0.2, 0.3], None), ([0.0, 0.0, 0.0], 4)],
)
def test_the_limit_is_the_largest_number_of_ranks_below_a_twentieth(shares: list[float], limit: int | None) -> None:
    cases = [
        Case(num_ranks=2**power, chosen=_candidate(1, 1.0), exposed_share=share, frontier=())
        for power, share in enumerate(shares)
    ]
    assert hidable_up_to_ranks(cases) == limit


def test_a_model_of_the_paper_has_its_sizes() -> None:
    shape = layer_shape(ClustersSection(model="MoE-BERT-L", num_experts=64, ranks=(16,)), 16)
    assert (shape.d_model, shape.hidden.d_hidden, shape.num_experts, shape.num_ranks) == (1024, 4096, 64, 16)
    own = layer_shape(ClustersSection(model=None, d_model=8, d_hidden=24, gated=True), 2)
    assert (own.d_model, own.hidden.width, own.hidden.in_place) == (8, 48, False)


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("devices=[a100_hdd]", r"bench\.clusters\.devices: device: got 'a100_hdd' .*; accepted is one of \["),
        ("device_budget_bytes=10", r"bench\.clusters: lab with 1 ranks: device_budget_bytes: got 10 .* fits with"),
        ("device_budget_bytes=-1", r"bench\.clusters: device_budget_bytes: got -1, accepts 0 or more"),
        ("num_experts=4", r"bench\.clusters: num_experts: got 4, which 32 of ranks=\[1, 4, 32\] do not divide"),
        ("num_tokens=31", r"bench\.clusters: num_tokens: got 31, accepts 32 or more with 32 experts"),
        ("top_k=2", r"bench\.clusters: top_k: got 2, accepts 1 or less with 1 experts"),
        ("ranks=[]", r"bench\.clusters: ranks: got \[\], accepts"),
        ("ranks=[0]", r"bench\.clusters: ranks: got \[0\], accepts"),
        ("devices=[]", r"bench\.clusters: devices: got an empty list, accepts"),
        ("node_gbit=0", r"bench\.clusters: node_gbit: got 0\.0, accepts a number above 0, or null"),
        ("peer_us=-1", r"bench\.clusters: peer_us: got -1\.0, accepts 0 or more"),
        ("model=GPT-4", r"bench\.clusters\.model: got 'GPT-4' .*MoE-GPT3-S"),
    ],
)
def test_what_it_refuses(override: str, text: str, simulate: Callable[..., Outcome]) -> None:
    with pytest.raises(ConfigError, match=text):
        simulate(f"bench.clusters.{override}")
