"""The papers' formulas: Table II, and equation 10 and the phases on examples worked by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_pipeline.config import Restore
from moe_pipeline.plan.device import Speed, interference
from moe_pipeline.plan.ledger import LayerShape
from moe_pipeline.plan.performance_model import Workload, equation_10_us, phases_us, workload
from moe_pipeline.plan.rings import HiddenShape
from moe_pipeline.plan.strategy import strategy
from tests.moe_pipeline.machine import alphas, machine

TABLE_2 = {
    "none": ((2, 2, 0), (4, 2, 0)),
    "S1": ((2, 2, 5), (4, 2, 5)),
    "S2": ((2, 2, 4), (4, 3, 4)),
    "S3": ((2, 2, 1), (5, 2, 1)),
    "S4": ((2, 2, 0), (5, 3, 0)),
}
GATED = {
    "none": ((3, 2, 0), (6, 2, 0)),
    "S1": ((3, 2, 9), (6, 2, 9)),
    "S2": ((3, 2, 8), (6, 3, 8)),
    "S3": ((3, 2, 1), (8, 2, 1)),
    "S4": ((3, 2, 0), (8, 3, 0)),
}


@pytest.mark.parametrize("restore", TABLE_2)
def test_the_workload_is_table_2(restore: Restore) -> None:
    for backward in (False, True):
        found = workload(strategy(restore), gated=False, hidden_per_width=4.0, backward=backward)
        assert found == Workload(*TABLE_2[restore][backward])


@pytest.mark.parametrize("restore", GATED)
def test_gated_experts_have_a_wider_first_product_and_a_wider_hidden_value(restore: Restore) -> None:
    for backward in (False, True):
        found = workload(strategy(restore), gated=True, hidden_per_width=4.0, backward=backward)
        assert found == Workload(*GATED[restore][backward])


def test_copies_of_hidden_values_follow_the_layers_width() -> None:
    assert workload(strategy("S1"), gated=False, hidden_per_width=1.5, backward=False).copies == 2.5


def _shape(num_ranks: int = 2, tokens: int = 8) -> LayerShape:
    """M=2, H=8, one expert per rank; for 4 rows: 128 FLOP a product, 16 bytes leave of 32."""
    hidden = HiddenShape(d_hidden=8, gated=False, in_place=True)
    return LayerShape(tokens=tokens, top_k=1, d_model=2, hidden=hidden, num_experts=num_ranks, num_ranks=num_ranks)


FAST_PRODUCTS = Speed(0.0, ((1.0, 8e6),))  # 16 us for 128 FLOP
SLOWED = interference(
    alphas(comm_compute=0.8, comm_all=0.5, copy_all=0.8, compute_comm=0.5, compute_all=0.25, compute_copy=0.5,
           copy_compute=0.25)
)  # fmt: skip


@pytest.mark.parametrize(
    ("restore", "forward", "backward"),
    [
        # forward: products 2 * 16, messages 2 * 16, copies 32 each; the slowest stream
        ("none", 2 * 16 / 0.8, 4 * 16),
        ("S1", 5 * 32 / 0.8, 5 * 32 / 0.8),
        ("S2", 4 * 32 / 0.8, 4 * 32 / 0.8),
        ("S3", 2 * 16 / 0.5, 5 * 16),
        ("S4", 2 * 16 / 0.8, 5 * 16),
    ],
)
def test_equation_10_by_hand(restore: Restore, forward: float, backward: float) -> None:
    device = machine(product=FAST_PRODUCTS, interference=SLOWED)
    assert equation_10_us(_shape(), 2, restore, device) == 2 * (forward + backward)


def test_equation_10_of_a_slow_link_is_that_of_messages() -> None:
    device = machine(product=FAST_PRODUCTS, message=Speed(0.0, ((1.0, 1e5),)), interference=SLOWED)
    assert equation_10_us(_shape(), 2, "S4", device) == 2 * (2 * 160 + 3 * 160) / 0.8
    assert equation_10_us(_shape(), 2, "S3", device) == 2 * (2 * 160 + 2 * 160) / 0.5


def test_streams_that_are_not_there_slow_nobody() -> None:
    """One rank sends nothing: products alone run at full speed, beside copies at their factor for copies."""
    device = machine(product=FAST_PRODUCTS, interference=SLOWED)
    shape = _shape(num_ranks=1)
    assert equation_10_us(shape, 2, "none", device) == phases_us(shape, 2, "none", device) == 2 * (2 + 4) * 16
    assert equation_10_us(shape, 2, "S1", device) == 2 * (5 + 5) * 32 / 0.25


def test_phases_without_copies_by_hand() -> None:
    """n=2, S=R=16; compute 32 and 64 at half speed beside messages, which run at 0.8."""
    device = machine(product=FAST_PRODUCTS, interference=SLOWED)
    forward = 16 + 64 + 64 + 16
    backward = 16 + 128 + 128 + 16
    assert phases_us(_shape(), 2, "none", device) == forward + backward


@pytest.mark.parametrize(
    ("restore", "forward", "backward"),
    [
        # n=4: a product 8, a message 8, a copy 16; all streams busy: compute at 1/2, messages at 1/2, copies at 0.8
        ("S1", 8 + 32 + 2 * 100 + 100 + 80, 80 + 100 + 2 * 100 + 64 + 8),
        ("S2", 8 + 32 + 2 * 80 + 80 + 64, 64 + 80 + 2 * 80 + 64 + 8),
        ("S3", 8 + 32 + 2 * 32 + 32 + 16, 16 + 80 + 2 * 80 + 80 + 8),
    ],
)
def test_phases_with_copies_by_hand(restore: Restore, forward: float, backward: float) -> None:
    slowed = interference(alphas(compute_all=0.5, comm_all=0.5, copy_all=0.8))
    device = machine(product=FAST_PRODUCTS, interference=slowed)
    assert phases_us(_shape(), 4, restore, device) == forward + backward


def test_one_chunk_is_the_sum_of_its_stages() -> None:
    """8 rows: a product 32, a message 32, a copy 64, and nothing to interfere with."""
    device = machine(product=FAST_PRODUCTS, interference=SLOWED)
    for restore, (forward, backward) in TABLE_2.items():
        products, messages, copies = (forward[index] + backward[index] for index in range(3))
        expected = 32 * products + 32 * messages + 64 * copies
        assert phases_us(_shape(), 1, restore, device) == expected  # type: ignore[arg-type]


@given(st.integers(2, 8), st.integers(1, 50), st.integers(1, 64), st.integers(1, 64), st.sampled_from(["none", "S4"]))
def test_without_copies_and_interference_phases_are_the_closed_form(
    num_chunks: int, rows: int, product: int, message: int, restore: Restore
) -> None:
    """t_S + max(t_C, t_S) + (n-2) max(t_C, t_S + t_R) + max(t_C, t_R) + t_R, with rates that keep times whole."""
    device = machine(product=Speed(0.0, ((1.0, 32e6 / product),)), message=Speed(0.0, ((1.0, 4e6 / message),)))
    total = 0
    for backward in (False, True):
        products, messages, _ = TABLE_2[restore][backward]
        compute, receive = products * rows * product, rows * message
        send = (messages - 1) * receive
        total += send + max(compute, send) + (num_chunks - 2) * max(compute, send + receive)
        total += max(compute, receive) + receive
    found = phases_us(_shape(tokens=rows * num_chunks), num_chunks, restore, device)
    assert round(found, 3) == total


def test_every_expert_of_a_rank_has_its_own_latency() -> None:
    device = machine(product=Speed(10.0, ((1.0, 1e6),)))
    hidden = HiddenShape(d_hidden=8, gated=False, in_place=True)
    shape = LayerShape(tokens=8, top_k=1, d_model=2, hidden=hidden, num_experts=4)
    assert equation_10_us(shape, 1, "none", device) == (2 + 4) * (4 * 10 + 2 * 8 * 2 * 8)
