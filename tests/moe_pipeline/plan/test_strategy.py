"""The paper's Table II, written out once more."""

import pytest

from moe_pipeline.plan.strategy import RingDepths, ring_depths, strategy

TABLE = {
    "none": ("keep", "keep"),
    "S1": ("offload", "offload"),
    "S2": ("resend", "offload"),
    "S3": ("offload", "recompute"),
    "S4": ("resend", "recompute"),
}


@pytest.mark.parametrize("name", TABLE)
def test_each_strategy_is_that_of_table_two(name: str) -> None:
    chosen = strategy(name)  # type: ignore[arg-type]
    assert (chosen.name, chosen.dispatched, chosen.hidden) == (name, *TABLE[name])
    assert chosen.shares_buffers == (name != "none")


@pytest.mark.parametrize("name", TABLE)
def test_depths_are_the_papers_but_for_a_second_hidden_buffer_under_copies(name: str) -> None:
    chosen, copied = strategy(name), TABLE[name][1] == "offload"  # type: ignore[arg-type]
    for num_chunks in (2, 3, 8):
        depths = ring_depths(chosen, num_chunks)
        assert depths == RingDepths(staging=2, dispatched=2, hidden=2 if copied else 1, result=2)
    assert ring_depths(chosen, 1) == RingDepths(
        staging=1, dispatched=1, hidden=1, result=1
    )  # nothing to alternate with


def test_refuses_another_name() -> None:
    with pytest.raises(ValueError, match=r"restore: got 'S5'; accepted is one of none, S1, S2, S3, S4"):
        strategy("S5")  # type: ignore[arg-type]
