"""Which pair is chosen, which are passed over and why, and what an impossible budget is answered with."""

import logging
import re
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_pipeline.config import PipelineConfig, Restore
from moe_pipeline.plan.budget import CHUNK_COUNTS, RESTORES, Budget, BudgetError, Footprint
from moe_pipeline.plan.call import plan_call
from moe_pipeline.plan.device import Device, Speed, interference
from moe_pipeline.plan.ledger import LayerShape, balanced_partition, ledger
from moe_pipeline.plan.performance_model import equation_10_us, phases_us
from moe_pipeline.plan.rings import HiddenShape
from moe_pipeline.plan.selector import TIE, Candidate, candidates, select
from moe_pipeline.plan.simulator import step_us
from tests.moe_pipeline.machine import alphas, machine

COPIES = {"none": 0, "S1": 2, "S2": 1, "S3": 1, "S4": 0}
GPU = machine(product=Speed(2.0, ((1.0, 64e6),)), message=Speed(9.0, ((1.0, 2e6),)), copy=Speed(1.0, ((1.0, 4e6),)))


def _shape(tokens: int = 512, num_ranks: int = 2) -> LayerShape:
    hidden = HiddenShape(d_hidden=32, gated=False, in_place=True)
    return LayerShape(tokens=tokens, top_k=1, d_model=8, hidden=hidden, num_experts=4, num_ranks=num_ranks)


def _candidate(
    predicted_us: float, num_chunks: int = 2, restore: Restore = "S1", host_bytes: int = 0, **why: str
) -> Candidate:
    footprint = Footprint(num_chunks=num_chunks, restore=restore, device_bytes=100, host_bytes=host_bytes)
    return Candidate(footprint=footprint, predicted_us=predicted_us, equation_10_us=0.0, phases_us=0.0, **why)


CANDIDATES = st.lists(
    st.builds(
        lambda predicted_us, num_chunks, restore, host_bytes, unwise, missing: _candidate(
            predicted_us, num_chunks, restore, host_bytes, unwise=unwise, missing=missing
        ),
        st.floats(1, 1.05), st.sampled_from(CHUNK_COUNTS), st.sampled_from(RESTORES), st.integers(0, 2),
        st.sampled_from(["", "slow copies"]), st.sampled_from(["", "7 bytes are missing on the host"]),
    ),
    min_size=1, max_size=12,
)  # fmt: skip


@given(CANDIDATES)
def test_the_choice_fits_and_nothing_that_fits_is_faster_by_more_than_a_tie(found: list[Candidate]) -> None:
    usable = [one for one in found if not one.unwise and not one.missing] or [one for one in found if not one.missing]
    if not usable:
        with pytest.raises(BudgetError):
            select(found)
        return
    chosen = select(found)
    assert chosen in usable
    fastest = min(one.predicted_us for one in usable)
    assert chosen.predicted_us <= fastest * (1 + TIE)
    for one in usable:
        if one.predicted_us <= fastest * (1 + TIE):
            keys = [(o.footprint.host_bytes, COPIES[o.restore], o.num_chunks) for o in (chosen, one)]
            assert keys[0] <= keys[1]


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        (_candidate(1000, 8, "S1", 0), _candidate(1011, 1, "none", 0)),  # no tie: faster
        (_candidate(1009, 8, "S1", 3), _candidate(1000, 1, "none", 4)),  # host memory before copies and chunks
        (_candidate(1009, 8, "S4", 3), _candidate(1000, 1, "S2", 3)),  # then copies
        (_candidate(1009, 8, "S3", 3), _candidate(1000, 1, "S1", 3)),
        (_candidate(1009, 2, "S2", 3), _candidate(1000, 3, "S3", 3)),  # then chunks
    ],
)
def test_ties_go_to_less_host_memory_then_fewer_copies_then_fewer_chunks(better: Candidate, worse: Candidate) -> None:
    assert select([better, worse]) == select([worse, better]) == better


def test_candidates_carry_what_the_models_and_the_ledger_say() -> None:
    shape = _shape()
    found = candidates(shape, GPU, chunk_counts=(1, 3), restores=("S1", "none"))
    assert [(one.restore, one.num_chunks) for one in found] == list(product(("S1", "none"), (1, 3)))
    for one in found:
        config = PipelineConfig(num_chunks=one.num_chunks, restore=one.restore)
        cut = balanced_partition(shape, config)
        account = ledger(shape, config)
        assert one.footprint.device_bytes == account.activation_bytes
        assert one.footprint.host_bytes == account.host_bytes
        assert one.predicted_us == step_us(plan_call("moe", config, cut), shape, GPU)
        assert one.equation_10_us == equation_10_us(shape, one.num_chunks, one.restore, GPU)
        assert one.phases_us == phases_us(shape, one.num_chunks, one.restore, GPU)
        assert not one.refused


def _refused(device: Device, **options: object) -> dict[tuple[int, str], str]:
    return {(one.num_chunks, one.restore): one.refused for one in candidates(_shape(), device, **options)}  # type: ignore[arg-type]


def test_without_pinned_memory_nothing_is_copied() -> None:
    for (_, restore), reason in _refused(machine(pinned=False)).items():
        assert bool(reason) == bool(COPIES[restore])
        assert not reason or reason.startswith("there is no pinned host memory")


@pytest.mark.parametrize("slow", ["copy_compute", "compute_copy"])
def test_where_copies_and_compute_slow_each_other_by_half_nothing_is_copied(slow: str) -> None:
    device = machine(interference=interference(alphas(**{slow: 0.5})))
    for (_, restore), reason in _refused(device).items():
        assert bool(reason) == bool(COPIES[restore])
        assert not reason or reason.startswith("copies and compute slow each other below one half")


@pytest.mark.parametrize("slow", ["comm_compute", "compute_comm"])
def test_where_messages_and_compute_slow_each_other_by_half_there_is_one_chunk(slow: str) -> None:
    device = machine(interference=interference(alphas(**{slow: 0.5})))
    for (num_chunks, _), reason in _refused(device).items():
        assert bool(reason) == (num_chunks > 1)
        assert not reason or reason.startswith("messages and compute slow each other below one half")
    alone = candidates(_shape(num_ranks=1), device)
    assert not any(one.refused for one in alone), "one rank sends nothing: chunks save memory there"


def test_an_unwise_pair_is_taken_where_no_other_fits_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    device = machine(pinned=False)
    least = min((one.footprint for one in candidates(_shape(), device)), key=lambda one: one.device_bytes)
    assert COPIES[least.restore], "the smallest pair here copies"
    with caplog.at_level(logging.INFO):
        chosen = select(candidates(_shape(), device, budget=Budget(device_bytes=least.device_bytes)))
    assert COPIES[chosen.restore]
    assert "there is no pinned host memory" in caplog.text
    with caplog.at_level(logging.INFO):
        assert select(candidates(_shape(), device, restores=("S1",))).restore == "S1"


def test_the_log_says_why_a_faster_pair_was_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    found = [_candidate(1000, 4, "none", missing="7 bytes are missing on the device"), _candidate(2000, 8, "S4")]
    with caplog.at_level(logging.INFO):
        assert select(found) == found[1]
    assert "n=8 S4 is chosen; faster pairs were refused: 7 bytes are missing on the device" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        select([_candidate(1000, 8, "S4"), _candidate(2000, 4, "none", missing="7 bytes are missing on the device")])
    assert caplog.text == ""


def test_missing_bytes_are_exact() -> None:
    for one in candidates(_shape(), GPU, budget=Budget(device_bytes=60_000, host_bytes=20_000)):
        over = one.footprint.device_bytes - 60_000, one.footprint.host_bytes - 20_000
        for place, num_bytes in zip(("device", "host"), over, strict=True):
            assert (f"{num_bytes:,} bytes are missing on the {place}" in one.refused) == (num_bytes > 0)
        assert bool(one.refused) == (max(over) > 0)


def test_without_a_budget_it_is_what_the_device_and_its_host_have() -> None:
    for one in candidates(_shape(), machine(memory_bytes=60_000, host_bytes=20_000)):
        assert bool(one.refused) == (one.footprint.device_bytes > 60_000 or one.footprint.host_bytes > 20_000)


@given(st.integers(1, 600), st.integers(1, 2), st.integers(0, 3000), st.integers(0, 10_000), st.booleans())
def test_the_error_names_a_setting_that_fits(
    tokens: int, num_ranks: int, device_bytes: int, host_bytes: int, pinned: bool
) -> None:
    shape, device = _shape(tokens, num_ranks), machine(pinned=pinned)
    budget = Budget(device_bytes=min(device_bytes, 80 * tokens), host_bytes=host_bytes)
    found = candidates(shape, device, budget=budget)
    if not all(one.missing for one in found):
        assert not select(found, budget).missing
        return
    with pytest.raises(BudgetError, match=rf"device_budget_bytes: got {budget.device_bytes} with ") as caught:
        select(found, budget)
    text = str(caught.value)
    num_chunks, restore = re.findall(r"num_chunks=(\d+) with restore='(\w+)'", text)[0]
    needed = Budget(
        device_bytes=int(re.findall(r"fits with device_budget_bytes=(\d+)", text)[0]),
        host_bytes=int(re.findall(r"and host_budget_bytes=(\d+);", text)[0]),
    )
    chosen = select(
        candidates(shape, device, budget=needed, chunk_counts=(int(num_chunks),), restores=(restore,)), needed
    )
    assert (chosen.num_chunks, chosen.restore, chosen.missing) == (int(num_chunks), restore, "")
    assert not select(candidates(shape, device, budget=needed), needed).missing
    missing = needed.device_bytes - budget.device_bytes  # type: ignore[operator]
    assert f"{missing:,} bytes are missing on the device" in text or missing <= 0


def test_a_candidate_prints_on_one_line() -> None:
    shown = str(_candidate(12345.6, 4, "S3", 2048, missing="7 bytes are missing on the host"))
    assert " ".join(shown.split()) == "n=4 S3 12,346 us 100 B 2,048 B host 7 bytes are missing on the host"
    assert str(_candidate(1.0)).endswith("fits")
