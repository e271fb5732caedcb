"""How many buffers of which size a pass shares: the paper's section III-D, and what travels decides which there are."""

from itertools import product

import pytest

from moe_pipeline.plan.partition import Partition, partition
from moe_pipeline.plan.rings import (
    ALIGNMENT_BYTES,
    HiddenShape,
    RingSize,
    aligned,
    hidden_rings,
    row_rings,
    total_bytes,
)
from moe_pipeline.plan.strategy import RingDepths

DEPTHS = RingDepths(staging=2, dispatched=3, hidden=4, result=5)  # all different, so that a mix-up shows


def _cut(num_ranks: int, num_experts: int) -> Partition:
    sent, received = (((rows,) * num_experts,) * num_ranks for rows in (4, 10))
    return partition(sent, received, num_chunks=2)


def test_sizes_are_aligned() -> None:
    assert [aligned(size) for size in (0, 1, 64, 65)] == [0, 64, 64, 128]
    ring = RingSize(3, 5, 3, 4)  # 60 bytes each
    assert (ring.buffer_bytes, ring.num_bytes) == (ALIGNMENT_BYTES, 3 * ALIGNMENT_BYTES)
    assert RingSize(3, 0, 3, 4).num_bytes == 0
    assert total_bytes({"a": ring, "b": RingSize(1, 5, 3, 8)}) == 5 * ALIGNMENT_BYTES
    assert total_bytes({}) == 0


@pytest.mark.parametrize(("num_ranks", "num_experts"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_rows_have_rings_for_what_happens_to_them(num_ranks: int, num_experts: int) -> None:
    exchanges, sorts = num_ranks > 1, num_ranks > 1 and num_experts > 1
    sent, received = (rows * num_ranks * num_experts for rows in (2, 5))
    for backward, resends in product((False, True), (False, True)):
        rings = row_rings(
            _cut(num_ranks, num_experts), DEPTHS, width=6, element_bytes=2, backward=backward, resends=resends
        )
        expected = {"arrived": (3, received)}
        if exchanges:
            expected |= {"staging": (2, sent), "result": (5, received)}
        if sorts:
            expected |= {"sorted": (3, received), "unsorted": (1, received)}
        if backward:
            expected["input"] = (3, received)
        if backward and resends and exchanges:
            expected["input_staging"] = (2, sent)
        if backward and resends and sorts:
            expected["input_sorted"] = (3, received)
        assert {name: (ring.depth, ring.rows) for name, ring in rings.items()} == expected
        assert {(ring.width, ring.element_bytes) for ring in rings.values()} == {(6, 2)}


@pytest.mark.parametrize(
    ("gated", "in_place", "beside"),
    [
        (False, True, {"hidden": (4, 8)}),
        (False, False, {"hidden": (4, 8), "activated": (1, 8)}),
        (True, False, {"hidden": (4, 16), "activated": (1, 8)}),
    ],
)
def test_hidden_values_have_rings_as_wide_as_they_are(
    gated: bool, in_place: bool, beside: dict[str, tuple[int, int]]
) -> None:
    shape = HiddenShape(d_hidden=8, gated=gated, in_place=in_place)
    assert shape.width == (16 if gated else 8)
    gradients = {"grad_hidden": (1, shape.width), **({"grad_activated": (1, 8)} if gated else {})}
    for backward in (False, True):
        rings = hidden_rings(9, DEPTHS, shape, element_bytes=4, backward=backward)
        expected = {**beside, **(gradients if backward else {})}
        assert {name: (ring.depth, ring.width) for name, ring in rings.items()} == expected
        assert {(ring.rows, ring.element_bytes) for ring in rings.values()} == {(9, 4)}
