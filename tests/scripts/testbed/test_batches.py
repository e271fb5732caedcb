import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.typed import ConfigError
from scripts.testbed.batches import EpochRows, TokenBatches, padded_length

LENGTHS = st.lists(st.integers(1, 128), min_size=1, max_size=200)


@given(st.integers(1, 1000))
def test_a_padded_length_holds_the_sequence_in_few_shapes(length: int) -> None:
    padded = padded_length(length)
    assert length <= padded < length + 16
    assert padded % 8 == 0
    assert padded_length(padded) == padded


@given(LENGTHS, st.integers(0, 5))
def test_an_epoch_holds_every_row_once_and_no_batch_exceeds_its_tokens(lengths: list[int], epoch: int) -> None:
    batches = TokenBatches(lengths, batch_tokens=160, num_batches=1, seed=3)
    rows = batches.epoch(epoch)
    assert sorted(row for batch in rows for row in batch) == list(range(len(lengths)))
    assert all(len(batch) * max(padded_length(lengths[row]) for row in batch) <= 160 for batch in rows)


@given(LENGTHS, st.integers(1, 40))
def test_a_run_is_a_prefix_of_its_epochs_in_order(lengths: list[int], num_batches: int) -> None:
    sampler = TokenBatches(lengths, batch_tokens=160, num_batches=num_batches, seed=3)
    drawn = list(sampler)
    assert len(drawn) == len(sampler) == num_batches
    epochs = [{epoch for epoch, _ in batch} for batch in drawn]
    assert all(len(epoch) == 1 for epoch in epochs)
    flat = [next(iter(epoch)) for epoch in epochs]
    assert flat == sorted(flat)
    assert drawn == list(sampler)
    assert [row for epoch, row in drawn[0]] == sampler.epoch(0)[0]


@given(LENGTHS, st.integers(1, 3), st.integers(1, 8))
def test_ranks_share_one_sequence(lengths: list[int], num_ranks: int, num_batches: int) -> None:
    def draw(count: int, rank: int, ranks: int) -> list[list[tuple[int, int]]]:
        settings = {"batch_tokens": 160, "num_batches": count, "seed": 3, "rank": rank, "num_ranks": ranks}
        return list(TokenBatches(lengths, **settings))  # type: ignore[arg-type]

    alone = draw(num_batches * num_ranks, 0, 1)
    for rank in range(num_ranks):
        assert draw(num_batches, rank, num_ranks) == alone[rank::num_ranks]


def test_seed_and_epoch_change_the_order() -> None:
    lengths = list(range(1, 129))
    orders = {
        (seed, epoch): str(TokenBatches(lengths, batch_tokens=160, num_batches=1, seed=seed).epoch(epoch))
        for seed in (1, 2)
        for epoch in (0, 1)
    }
    assert len(set(orders.values())) == 4


def test_a_batch_too_small_for_the_longest_row_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.batch_tokens: got 100, accepts at least 128"):
        TokenBatches([5, 120], batch_tokens=100, num_batches=1, seed=0)
    with pytest.raises(ConfigError, match=r"data\.name: got a set without training examples"):
        TokenBatches([], batch_tokens=100, num_batches=1, seed=0)


def test_rows_know_the_epoch_they_are_read_in() -> None:
    rows = EpochRows([{"input_ids": [1]}, {"input_ids": [2]}])
    assert rows[3, 1] == {"input_ids": [2], "epoch": 3}
    assert len(rows) == 2
