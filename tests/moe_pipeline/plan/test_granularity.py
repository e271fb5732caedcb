"""The search finds the best n of a hill, tries little, keeps ranges in order, and notices change."""

import json
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moe_pipeline.plan.budget import CHUNK_COUNTS
from moe_pipeline.plan.granularity import BUCKETS_PER_OCTAVE, Granularity, SearchRules, bucket

TimeOf = Callable[[int, int], float]
FREE = SearchRules(allowance=10_000, better=0.0)


def _hill(best: int, steepness: float = 0.1) -> Callable[[int], float]:
    """A time with one lowest point over the positions of the chunk counts."""
    peak = CHUNK_COUNTS.index(best)
    return lambda n: 100.0 * (1 + steepness * abs(CHUNK_COUNTS.index(n) - peak))


def _run(search: Granularity, tokens: int, time_of: Callable[[int], float], steps: int) -> list[int]:
    chosen = []
    for _ in range(steps):
        chosen.append(search.choose(tokens))
        search.observe(tokens, chosen[-1], time_of(chosen[-1]))
    return chosen


@given(best=st.sampled_from(CHUNK_COUNTS), start=st.sampled_from(CHUNK_COUNTS))
def test_a_walk_ends_on_the_top_of_a_hill_from_anywhere(best: int, start: int) -> None:
    search = Granularity(CHUNK_COUNTS, FREE, guess=lambda _: start)
    chosen = _run(search, 1024, _hill(best), 40)
    assert chosen[-1] == best
    assert search.found(1024) == (best, 100.0)
    assert set(chosen[-20:]) == {best}, "nothing is tried once the search is over"


def test_a_walk_stops_at_the_first_worsening() -> None:
    search = Granularity(CHUNK_COUNTS, FREE, guess=lambda _: 1)
    tried = set(_run(search, 1024, _hill(2), 40))
    assert tried == {1, 2, 3}, "n=4, 6 and 8 lie behind the first n that is worse"


def test_a_neighbour_must_be_clearly_faster() -> None:
    rules = SearchRules(better=0.05)
    search = Granularity(CHUNK_COUNTS, rules, guess=lambda _: 2)
    assert _run(search, 64, lambda n: 97.0 if n == 3 else 100.0, 40)[-1] == 2
    search = Granularity(CHUNK_COUNTS, rules, guess=lambda _: 2)
    assert _run(search, 64, lambda n: 90.0 if n == 3 else 100.0, 40)[-1] == 3


def test_inside_a_range_nothing_is_tried() -> None:
    search = Granularity(CHUNK_COUNTS, FREE)
    _run(search, 1000, _hill(4), 40)
    _run(search, 4000, _hill(4), 40)
    before = search.trial_steps
    assert search.choose(2000) == 4
    assert _run(search, 2000, _hill(1), 3) == [4, 4, 4], "even where something else would be faster"
    assert search.trial_steps == before


def test_outside_only_numbers_between_the_neighbouring_ranges_are_tried() -> None:
    search = Granularity(CHUNK_COUNTS, FREE)
    _run(search, 256, _hill(2), 40)
    _run(search, 8192, _hill(6), 40)
    tried = set(_run(search, 1024, _hill(8), 40))
    assert tried <= {2, 3, 4, 6}
    assert search.choose(1024) == 6


@given(
    batches=st.lists(st.integers(1, 20_000), min_size=1, max_size=12, unique_by=bucket),
    bests=st.lists(st.sampled_from(CHUNK_COUNTS), min_size=12, max_size=12),
)
def test_the_best_n_never_falls_as_batches_grow(batches: list[int], bests: list[int]) -> None:
    """Whatever is measured, ranges stay disjoint and in order, so that every B has one answer."""
    search = Granularity(CHUNK_COUNTS, FREE)
    for tokens, best in zip(batches, bests, strict=False):
        _run(search, tokens, _hill(best), 40)
    answers = [search.choose(tokens) for tokens in sorted(batches)]
    assert answers == sorted(answers)


@given(tokens=st.integers(0, 10**9))
@example(tokens=0)
@example(tokens=1)
@example(tokens=2)
@example(tokens=1024)
def test_buckets_are_few_and_hold_near_numbers(tokens: int) -> None:
    bound = bucket(tokens)
    assert bound >= tokens
    assert bucket(bound) == bound
    if tokens > 2 * BUCKETS_PER_OCTAVE:
        assert bound <= tokens * (1 + 1 / BUCKETS_PER_OCTAVE)


def test_times_of_a_bucket_are_compared_per_token() -> None:
    """A smaller batch of the same bucket is no sign that an n is faster."""
    search = Granularity((1, 2), FREE, guess=lambda _: 1)
    for _ in range(FREE.trials):
        assert search.choose(1024) == 1
        search.observe(1024, 1, 1024.0)
    for _ in range(FREE.trials):
        assert search.choose(900) == 2
        search.observe(900, 2, 950.0)  # faster in time, slower per token
    assert search.choose(1000) == 1


@pytest.mark.parametrize("factor", [1.5, 0.6])
def test_a_lasting_change_starts_a_new_search_from_what_was_best(factor: float) -> None:
    search = Granularity(CHUNK_COUNTS, FREE)
    _run(search, 1024, _hill(4), 40)
    _run(search, 4096, _hill(6), 40)
    chosen = _run(search, 4096, lambda n: factor * _hill(8)(n), 40)
    assert search.searches == 1
    assert chosen[-1] == 8
    assert set(chosen) == {6, 8}
    assert search.choose(1024) == 4, "where the search begins elsewhere"


def test_a_single_slow_step_changes_nothing() -> None:
    search = Granularity(CHUNK_COUNTS, FREE)
    _run(search, 1024, _hill(4), 40)
    for time_us in (500.0, 100.0, 500.0, 100.0, 500.0):
        search.observe(1024, search.choose(1024), time_us)
    assert search.searches == 0
    assert search.choose(1024) == 4


def test_trials_have_a_budget() -> None:
    rules = SearchRules(allowance=3, budget=0.0)
    search = Granularity(CHUNK_COUNTS, rules, guess=lambda _: 2)
    for tokens in (64, 256, 1024, 4096):
        _run(search, tokens, _hill(8), 10)
    assert search.trial_steps == 3


def test_steps_that_are_not_timed_try_nothing() -> None:
    search = Granularity(CHUNK_COUNTS, FREE, guess=lambda _: 2)
    assert [search.choose(64, may_try=False) for _ in range(10)] == [2] * 10
    assert search.trial_steps == 0


def test_only_what_is_allowed_is_chosen() -> None:
    search = Granularity(CHUNK_COUNTS, FREE)
    _run(search, 1024, _hill(2), 40)
    assert search.choose(1024, allowed=(6, 8)) == 6, "the nearest that fits"
    assert search.choose(1024) == 2
    with pytest.raises(ValueError, match=r"allowed: got \(5,\); accepted is at least one of"):
        search.choose(1024, allowed=(5,))


def test_equal_histories_have_equal_digests_and_other_ones_not() -> None:
    one, other = (Granularity(CHUNK_COUNTS, FREE) for _ in range(2))
    _run(one, 512, _hill(4), 5)
    _run(other, 512, _hill(4), 5)
    assert one.digest() == other.digest()
    other.observe(512, 4, 77.0)
    assert one.digest() != other.digest()


def test_what_was_found_is_kept() -> None:
    search = Granularity(CHUNK_COUNTS, FREE)
    _run(search, 512, _hill(3), 40)
    again = Granularity(CHUNK_COUNTS, FREE)
    again.restore(json.loads(json.dumps(search.state())))
    assert again.found(512) == (3, 100.0)
    assert set(_run(again, 512, _hill(3), 10)) == {3}
    assert again.trial_steps == 0


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"512": 4}, "got 4; accepted is an object"),
        ({"512": {"num_chunks": 5, "reference_us": 1.0}}, "got num_chunks=5; accepted is one of"),
        ({"512": {"num_chunks": 4, "reference_us": -1.0}}, "got reference_us=-1.0; accepted is a time above 0"),
        ({"many": {"num_chunks": 4, "reference_us": 1.0}}, "invalid literal for int"),
    ],
)
def test_a_state_that_cannot_be_is_refused(state: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Granularity(CHUNK_COUNTS).restore(state)
