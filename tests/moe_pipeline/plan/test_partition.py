"""Sender and receiver cut the same counts in the same way, and nothing is lost or doubled."""

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_pipeline.config import Split
from moe_pipeline.plan.partition import Partition, Slice, partition

Counts = list[list[list[int]]]  # source rank -> destination rank -> local expert there -> rows


@st.composite
def _counts(draw: st.DrawFn, largest: int = 40) -> Counts:
    ranks, experts = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    rows = st.one_of(st.just(0), st.integers(0, 3), st.integers(0, largest))
    return [[[draw(rows) for _ in range(experts)] for _ in range(ranks)] for _ in range(ranks)]


def _cut(counts: Counts, num_chunks: int, split: Split) -> list[Partition]:
    """The partition of every rank."""
    return [
        partition(
            tuple(map(tuple, counts[rank])),
            tuple(tuple(source[rank]) for source in counts),
            num_chunks=num_chunks,
            split=split,
            rank=rank,
        )
        for rank in range(len(counts))
    ]


def _slices(cut: Partition, destination: int, expert: int) -> list[Slice]:
    return [chunk[destination][expert] for chunk in cut.sent]


def _pairs(counts: Counts) -> Iterator[tuple[int, int, int]]:
    for source, destinations in enumerate(counts):
        for destination, experts in enumerate(destinations):
            for expert in range(len(experts)):
                yield source, destination, expert


def _check(counts: Counts, cuts: list[Partition], num_chunks: int) -> None:
    for source, destination, expert in _pairs(counts):
        slices = _slices(cuts[source], destination, expert)
        received = [cuts[destination].received[chunk][source][expert] for chunk in range(num_chunks)]
        assert [part.rows for part in slices] == received
        taken = [row for part in slices for row in range(part.start, part.stop)]
        assert taken == list(range(counts[source][destination][expert]))  # every row once, in its order
    for rank, cut in enumerate(cuts):
        assert cut.num_chunks == num_chunks
        assert cut.num_experts == len(counts[0][0])
        for chunk in range(num_chunks):
            sent = [sum(part.rows for part in experts) for experts in cut.sent[chunk]]
            assert cut.sent_rows(chunk) == sent
            assert cut.received_rows(chunk) == [other.sent_rows(chunk)[rank] for other in cuts]
            assert sum(cut.expert_rows(chunk)) == sum(cut.received_rows(chunk))
        assert cut.max_sent_rows == max(sum(cut.sent_rows(chunk)) for chunk in range(num_chunks))
        assert cut.max_received_rows == max(sum(cut.received_rows(chunk)) for chunk in range(num_chunks))


@given(_counts(), st.integers(1, 8))
def test_chunks_of_tokens_are_equal_to_one_row_per_expert(counts: Counts, num_chunks: int) -> None:
    cuts = _cut(counts, num_chunks, "tokens")
    _check(counts, cuts, num_chunks)
    for source, destination, expert in _pairs(counts):
        rows = [part.rows for part in _slices(cuts[source], destination, expert)]
        assert max(rows) - min(rows) <= 1


@given(_counts(), st.integers(1, 8))
def test_local_rows_go_first_and_last(counts: Counts, num_chunks: int) -> None:
    cuts = _cut(counts, num_chunks, "local")
    _check(counts, cuts, num_chunks)
    if len(counts) == 1 or num_chunks == 1:
        assert cuts == _cut(counts, num_chunks, "tokens")
        return
    for source, destination, expert in _pairs(counts):
        rows = [part.rows for part in _slices(cuts[source], destination, expert)]
        if source == destination:
            assert sum(rows[1:-1]) == 0
            assert rows[0] - (rows[-1] if num_chunks > 2 else 0) in ((0, 1) if num_chunks > 2 else (sum(rows),))
        else:
            travelling = rows[1:-1] if num_chunks > 2 else rows[1:]
            assert rows[0] == 0
            assert sum(travelling) == sum(rows)
            assert max(travelling) - min(travelling) <= 1


@given(_counts())
def test_chunks_of_ranks_meet_one_rank_each(counts: Counts) -> None:
    num_ranks = len(counts)
    cuts = _cut(counts, num_ranks, "ranks")
    _check(counts, cuts, num_ranks)
    for rank, cut in enumerate(cuts):
        for chunk in range(num_ranks):
            to, source = (rank + chunk) % num_ranks, (rank - chunk) % num_ranks
            assert all(not rows for other, rows in enumerate(cut.sent_rows(chunk)) if other != to)
            assert all(not rows for other, rows in enumerate(cut.received_rows(chunk)) if other != source)


def test_an_example_by_hand() -> None:
    cut = partition(((5,), (2,)), ((5,), (7,)), num_chunks=2)
    assert cut.sent == (((Slice(0, 2),), (Slice(0, 1),)), ((Slice(2, 5),), (Slice(1, 2),)))
    assert cut.received == (((2,), (4,)), ((3,), (3,)))
    assert [cut.sent_rows(chunk) for chunk in (0, 1)] == [[2, 1], [3, 1]]
    assert [cut.expert_rows(chunk) for chunk in (0, 1)] == [(6,), (6,)]
    assert (cut.max_sent_rows, cut.max_received_rows) == (4, 6)


def test_few_rows_for_each_of_many_still_make_equal_chunks() -> None:
    """One row from each of eight ranks, in four chunks: two rows a chunk, not all in the last."""
    cut = partition(((1,),) * 8, ((1,),) * 8, num_chunks=4)
    assert [sum(cut.sent_rows(chunk)) for chunk in range(4)] == [2, 2, 2, 2]
    assert [sum(cut.received_rows(chunk)) for chunk in range(4)] == [2, 2, 2, 2]
    alone = partition(((3,) * 6,), ((3,) * 6,), num_chunks=2)
    assert [sum(alone.sent_rows(chunk)) for chunk in range(2)] == [9, 9]


@pytest.mark.parametrize("num_chunks", [1, 3])
def test_refuses_another_number_of_chunks_than_ranks(num_chunks: int) -> None:
    with pytest.raises(ValueError, match=rf"num_chunks: got {num_chunks} with split='ranks'.*number of ranks, 2"):
        partition(((1,), (2,)), ((1,), (2,)), num_chunks=num_chunks, split="ranks")
