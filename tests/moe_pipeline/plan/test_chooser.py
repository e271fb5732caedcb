"""What a chooser takes: within memory, none where it fits, the fastest strategy else, the same on every rank."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from moe_pipeline.config import PipelineConfig, Restore
from moe_pipeline.plan.budget import CHUNK_COUNTS, BudgetError, footprints
from moe_pipeline.plan.chooser import Chooser, Situation
from moe_pipeline.plan.device import Device, DeviceError, Speed, device_json
from moe_pipeline.plan.granularity import SearchRules, bucket
from moe_pipeline.plan.ledger import LayerShape
from moe_pipeline.plan.rings import HiddenShape
from moe_pipeline.plan.selector import candidates, select
from tests.moe_pipeline.machine import machine

FREE = SearchRules(allowance=10_000, better=0.0)
SLOW_LINK = machine(
    product=Speed(3.0, ((1.0, 4e9),)), message=Speed(20.0, ((1.0, 1e8),)), copy=Speed(1.0, ((1.0, 1e9),))
)


def _shape(num_ranks: int = 2) -> LayerShape:
    hidden = HiddenShape(d_hidden=64, gated=False, in_place=True)
    return LayerShape(tokens=1, top_k=1, d_model=16, hidden=hidden, num_experts=4, num_ranks=num_ranks)


def _auto(**settings: object) -> PipelineConfig:
    return PipelineConfig(num_chunks="auto", restore="auto", **settings)  # type: ignore[arg-type]


def _file(device: Device, folder: Path) -> str:
    path = folder / "device.json"
    path.write_text(device_json(device), encoding="utf-8")
    return str(path)


def _run(
    chooser: Chooser, tokens: int, time_of: Callable[[PipelineConfig], float], steps: int = 60
) -> list[PipelineConfig]:
    chosen = []
    for _ in range(steps):
        chosen.append(chooser.choose(Situation(tokens=tokens)))
        chooser.observe(time_of(chosen[-1]))
    return chosen


def _bytes(tokens: int, num_chunks: int, restore: Restore) -> int:
    (footprint,) = footprints(replace(_shape(), tokens=bucket(tokens)), (num_chunks,), (restore,))
    return footprint.device_bytes


def test_without_a_budget_nothing_is_restored_and_the_fastest_n_is_found() -> None:
    chosen = _run(Chooser(_auto(), _shape(), FREE), 1000, lambda plan: 100.0 + abs(plan.fixed_chunks - 4))
    assert {plan.restore for plan in chosen} == {"none"}
    assert chosen[-1].num_chunks == 4


def test_what_the_user_fixed_stays() -> None:
    layer = Chooser(PipelineConfig(num_chunks="auto", restore="S3"), _shape(), FREE)
    assert {plan.restore for plan in _run(layer, 500, lambda _: 1.0)} == {"S3"}
    layer = Chooser(PipelineConfig(num_chunks=3, restore="auto", timeout_s=7.0), _shape(), FREE)
    assert {(plan.num_chunks, plan.timeout_s) for plan in _run(layer, 500, lambda _: 1.0)} == {(3, 7.0)}


def test_alone_chunks_only_save_memory() -> None:
    assert Chooser(_auto(), _shape(num_ranks=1)).choose(Situation(tokens=1000)).num_chunks == 1


def test_a_budget_leaves_only_what_fits_in_it() -> None:
    tokens = 1024
    budget = _bytes(tokens, 4, "none")
    chosen = _run(
        Chooser(_auto(device_budget_bytes=budget), _shape(), FREE), tokens, lambda plan: 100.0 + plan.fixed_chunks
    )
    assert {plan.restore for plan in chosen} == {"none"}
    assert min(plan.fixed_chunks for plan in chosen) == 4


def test_where_none_does_not_fit_every_strategy_is_timed_and_the_fastest_stays() -> None:
    tokens, cost = 1024, {"S1": 120.0, "S2": 90.0, "S3": 110.0, "S4": 100.0}
    budget = _bytes(tokens, 8, "none") - 1
    chosen = _run(
        Chooser(_auto(device_budget_bytes=budget), _shape(), FREE),
        tokens,
        lambda plan: cost[plan.fixed_restore] + abs(plan.fixed_chunks - 6),
        steps=200,
    )
    assert {plan.restore for plan in chosen} == {"S1", "S2", "S3", "S4"}
    assert (chosen[-1].restore, chosen[-1].num_chunks) == ("S2", 6)
    assert all(_bytes(tokens, plan.fixed_chunks, plan.fixed_restore) <= budget for plan in chosen)


def test_no_host_memory_leaves_strategies_that_copy_nothing() -> None:
    budget = _bytes(1024, 8, "none") - 1
    chosen = _run(Chooser(_auto(device_budget_bytes=budget, host_budget_bytes=0), _shape(), FREE), 1024, lambda _: 1.0)
    assert {plan.restore for plan in chosen} == {"S4"}


def test_uneven_rows_count_against_the_budget() -> None:
    tokens = 1024
    chooser = Chooser(_auto(device_budget_bytes=_bytes(tokens, 8, "none")), _shape(), FREE)
    assert chooser.choose(Situation(tokens=tokens)).restore == "none"
    assert chooser.choose(Situation(tokens=tokens, skew=1.2)).restore != "none"


def test_a_budget_that_nothing_fits_is_an_error_that_says_what_would() -> None:
    with pytest.raises(BudgetError) as caught:
        Chooser(_auto(device_budget_bytes=1000), _shape()).choose(Situation(tokens=1024))
    assert "device_budget_bytes: got 1000" in str(caught.value)
    wanted = re.search(r"fits with device_budget_bytes=(\d+) and host_budget_bytes=(\d+)", str(caught.value))
    assert wanted is not None
    fitting = _auto(device_budget_bytes=int(wanted[1]), host_budget_bytes=int(wanted[2]))
    assert Chooser(fitting, _shape()).choose(Situation(tokens=1024)).num_chunks in CHUNK_COUNTS


def test_by_the_model_alone_it_takes_what_the_selector_takes(tmp_path: Path) -> None:
    pipeline = _auto(choose_by="model", device=_file(SLOW_LINK, tmp_path))
    chosen = Chooser(pipeline, _shape()).choose(Situation(tokens=4096))
    best = select([one for one in candidates(replace(_shape(), tokens=4096), SLOW_LINK) if one.restore == "none"])
    assert (chosen.num_chunks, chosen.restore) == (best.num_chunks, "none")
    assert best.num_chunks > 1


def test_a_device_says_where_trials_begin(tmp_path: Path) -> None:
    predicted = candidates(replace(_shape(), tokens=4096), SLOW_LINK, restores=("none",))
    best = min(predicted, key=lambda one: one.predicted_us).num_chunks
    chooser = Chooser(_auto(device=_file(SLOW_LINK, tmp_path)), _shape(), FREE)
    assert chooser.choose(Situation(tokens=4096)).num_chunks == best


def test_strategies_that_the_model_finds_far_slower_are_not_tried(tmp_path: Path) -> None:
    device = machine(
        product=Speed(0.0, ((1.0, 1e9),)), message=Speed(0.0, ((1.0, 1e9),)), copy=Speed(0.0, ((1.0, 1e4),))
    )
    budget = _bytes(1024, 8, "none") - 1
    chooser = Chooser(_auto(device_budget_bytes=budget, device=_file(device, tmp_path)), _shape(), FREE)
    assert {plan.restore for plan in _run(chooser, 1024, lambda _: 1.0)} == {"S4"}, "all others copy, which is slow"


def test_a_missing_device_file_is_an_error() -> None:
    with pytest.raises(DeviceError, match="device: got 'nowhere'"):
        Chooser(_auto(device="nowhere"), _shape())


def test_what_was_found_is_kept() -> None:
    first = Chooser(_auto(), _shape(), FREE)
    _run(first, 1000, lambda plan: 100.0 + abs(plan.fixed_chunks - 4))
    again = Chooser(_auto(), _shape(), FREE)
    again.restore(first.state())
    assert again.choose(Situation(tokens=1000)).num_chunks == 4
    for state, message in (([], "accepted is a mapping"), ({"S9": {}}, "got the strategy 'S9'")):
        with pytest.raises(ValueError, match=message):
            again.restore(state)


def test_equal_numbers_make_equal_choices() -> None:
    one, other = (Chooser(_auto(), _shape()) for _ in range(2))
    for step in range(100):
        tokens = (64, 700, 3000)[step % 3]
        assert one.choose(Situation(tokens=tokens)) == other.choose(Situation(tokens=tokens))
        one.observe(100.0 + step % 7)
        other.observe(100.0 + step % 7)
        assert one.digest() == other.digest()
    other.choose(Situation(tokens=64))
    other.observe(1.0)
    assert one.digest() != other.digest()


def test_findings_set_what_was_measured_beside_what_was_predicted(tmp_path: Path) -> None:
    chooser = Chooser(_auto(device=_file(SLOW_LINK, tmp_path)), _shape(), FREE)
    _run(chooser, 1000, lambda plan: 100.0 + abs(plan.fixed_chunks - 4))
    (finding,) = chooser.findings()
    predicted = candidates(replace(_shape(), tokens=bucket(1000)), SLOW_LINK, restores=("none",), chunk_counts=(4,))
    assert (finding.tokens, finding.restore, finding.num_chunks) == (bucket(1000), "none", 4)
    assert finding.measured_us == 100.0 * bucket(1000) / 1000
    assert finding.predicted_us == predicted[0].predicted_us
    without = Chooser(_auto(), _shape(), FREE)
    _run(without, 1000, lambda _: 100.0)
    assert without.findings()[0].predicted_us is None
