"""Searches on the model and on made-up measurements: what they find, what they refuse, and that they repeat."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion.plan import attention, gemm_chain
from fusion.plan.device import load_device
from fusion.plan.performance_model import PerformanceModel
from fusion.plan.registers import register_limit
from fusion.plan.schedule import schedule
from fusion.plan.search import PATIENCE, exhaustive_search, random_search, search
from fusion.plan.space import SpaceError, search_space
from tests.fusion.drawn_chains import chains

A100 = load_device("a100")
PAPER = search_space(gemm_chain(M=1024, N=1024, K=512, H=512, dtype="fp16"), A100)
SMALL = search_space(attention(M=64, N=96, K=32, H=48, heads=2), A100)
FITS = {"pipeline": lambda *_: (4, 2), "shared_bytes": lambda *_: 0}


def operand_bytes(chain, made, device):
    """A stand-in for what a kernel asks for: all loaded tiles, for each stage."""
    tiles = dict(made.tiles)
    return made.num_stages * chain.item_bytes * sum(
        math.prod(tiles[x] for x in tensor.dims if x in tiles) for tensor in chain.inputs
    )  # fmt: skip


def by_size(made):
    """A measurement that the model would not guess: the nearer the tiles are to 48, the faster."""
    return 1e-6 * (1 + sum(abs(size - 48) for _, size in made.tiles))


@pytest.mark.parametrize("run", [search, random_search])
@pytest.mark.parametrize("measure", [None, by_size])
def test_the_same_seed_finds_the_same(run, measure):
    first, second = (run(PAPER, measure=measure, seed=3, **FITS) for _ in range(2))
    assert first == second
    assert run(PAPER, measure=measure, seed=4, **FITS).rounds != first.rounds


def test_the_model_alone_comes_near_to_its_best():
    best = exhaustive_search(PAPER, **FITS).best.predicted.total_us
    for seed in range(5):
        found = search(PAPER, seed=seed, **FITS)
        assert found.best.measured_us is None
        assert best <= found.best.predicted.total_us <= 1.05 * best
        assert found.considered < PAPER.candidates / 3


def test_exhaustive_search_misses_nothing():
    model = PerformanceModel(PAPER.chain, PAPER.device)
    found = exhaustive_search(PAPER, **FITS)
    assert found.considered == PAPER.candidates
    assert found.best.predicted == model.predict(found.winner)
    drawn = random_search(PAPER, budget=400, **FITS)
    assert found.best.time_us <= drawn.best.time_us


def test_a_measurement_outweighs_the_model():
    """The fastest of all by measurement is found, though the model ranks it low."""
    best = exhaustive_search(SMALL, measure=by_size, **FITS)
    assert best.best.time_us == best.best.measured_us == min(trial.measured_us for trial in best.rounds[0])
    found = search(SMALL, measure=by_size, top=16, **FITS)
    assert found.best.measured_us == min(trial.measured_us for trials in found.rounds for trial in trials)
    assert found.winner == found.best.schedule
    assert found.best.measured_us <= random_search(SMALL, measure=by_size, budget=8, **FITS).best.measured_us


def test_no_kernel_is_measured_twice():
    measured = []

    def measure(made):
        measured.append((made.program(SMALL.chain), made.tiles))
        return by_size(made)

    found = exhaustive_search(SMALL, measure=measure, **FITS)
    assert len(set(measured)) == len(measured) == len(found.rounds[0]) < SMALL.candidates == found.considered
    measured.clear()
    search(SMALL, measure=measure, **FITS)
    assert len(set(measured)) == len(measured)


def test_the_most_that_a_round_measures_is_n_and_the_fastest_by_the_model():
    found = search(PAPER, measure=by_size, top=5, seed=1, **FITS)
    assert all(len(trials) <= 5 for trials in found.rounds)
    for trials in found.rounds:
        predicted = [trial.predicted.total_us for trial in trials]
        assert predicted == sorted(predicted)


def test_a_search_ends_after_rounds_without_a_gain():
    found = search(PAPER, epsilon=0.5, measure=lambda made: 1.0, **FITS)
    assert len(found.rounds) == 1 + PATIENCE


def test_the_best_so_far_is_kept():
    """The first measurement is the fastest: later rounds do not replace it."""
    times = iter(range(1, 10_000))
    found = search(PAPER, measure=lambda made: float(next(times)), **FITS)
    assert found.best == found.rounds[0][0]
    assert found.best.measured_us == 1e6


def test_what_is_refused_is_never_chosen():
    def measure(made):
        return "spills" if dict(made.tiles)["N"] != 96 else by_size(made)

    found = search(SMALL, measure=measure, **FITS)
    assert dict(found.winner.tiles)["N"] == 96
    assert dict(found.refused)["spills"] == sum(
        trial.refusal == "spills" for trials in found.rounds for trial in trials
    )
    assert all(trial.measured_us is None for trials in found.rounds for trial in trials if trial.refusal)


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -1.0])
def test_a_time_that_is_none_is_refused(seconds):
    def measure(made):
        return seconds if dict(made.tiles)["N"] != 96 else 1.0

    found = search(SMALL, measure=measure, **FITS)
    assert dict(found.winner.tiles)["N"] == 96
    assert dict(found.refused)[f"measured {seconds} s"] > 0


def test_the_devices_limit_holds_for_the_kernel_with_its_warps_and_stages():
    asked = []

    def shared_bytes(chain, made, device):
        asked.append((made.num_warps, made.num_stages, device))
        return operand_bytes(chain, made, device)

    found = search(PAPER, pipeline=lambda *_: (8, 3), shared_bytes=shared_bytes)
    assert set(asked) == {(8, 3, A100)}
    assert (found.winner.num_warps, found.winner.num_stages) == (8, 3)
    assert operand_bytes(PAPER.chain, found.winner, A100) <= A100.shared_bytes_per_block
    assert dict(found.refused)["above 166912 bytes of shared memory"] > 0
    exact = exhaustive_search(PAPER, pipeline=lambda *_: (8, 3), shared_bytes=operand_bytes)
    assert exact.best.time_us <= found.best.time_us <= 1.05 * exact.best.time_us


@pytest.mark.parametrize("run", [search, exhaustive_search])
def test_sums_that_fill_the_registers_are_refused(run):
    few = replace(A100, registers_per_sm=4096)
    chain = gemm_chain(M=1024, N=1024, K=128, H=128, batch=8, dtype="fp16")
    found = run(search_space(chain, few), **FITS)
    assert register_limit(chain, found.winner, few) is None
    assert register_limit(chain, run(search_space(chain, A100), **FITS).winner, few) is not None
    assert dict(found.refused)["too many registers for sums"] > 0


@pytest.mark.parametrize("run", [search, random_search, exhaustive_search])
def test_nothing_left_is_an_error_that_says_why(run):
    with pytest.raises(SpaceError, match=r"no candidate can be taken for C\[G,M,N\] = .* on a100:\nall: (.*\n)*"
                                         r"of \d+ that were ranked, refused:\n    \d+: too slow"):  # fmt: skip
        run(SMALL, measure=lambda made: "too slow", **FITS)
    with pytest.raises(SpaceError, match=r"\d+: above 166912 bytes of shared memory"):
        run(SMALL, pipeline=FITS["pipeline"], shared_bytes=lambda *_: 166913)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"population": 0}, "population=0 must be at least 1"),
        ({"top": 0}, "top=0 must be at least 1"),
        ({"epsilon": -0.1}, "epsilon=-0.1 must be at least 0 and below 1"),
        ({"epsilon": 1.0}, "epsilon=1.0 must be at least 0 and below 1"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        search(SMALL, **options, **FITS)


def test_a_budget_out_of_range_is_refused():
    with pytest.raises(ValueError, match="budget=0 must be at least 1"):
        random_search(SMALL, budget=0, **FITS)


def test_a_single_candidate_is_enough():
    space = search_space(gemm_chain(M=1, N=3, K=2), A100)
    found = search(space, **FITS)
    assert dict(found.winner.tiles) == {"M": 16, "N": 16, "K": 16}
    assert found.considered == space.candidates


def test_a_start_takes_part_in_the_first_round():
    """With a population of one, what is found is the start or a child of it; without one it is anything."""
    best = exhaustive_search(PAPER, **FITS).winner
    warm = search(PAPER, population=1, top=1, start=[best], **FITS)
    assert warm.rounds[0][0].schedule == best == warm.winner


def test_a_start_of_other_sizes_is_brought_into_the_space():
    wide = search(PAPER, **FITS).winner
    small = search_space(gemm_chain(M=100, N=60, K=33, H=48, dtype="fp16"), A100)
    found = search(small, population=1, top=1, start=[wide], **FITS)
    assert dict(found.winner.tiles).keys() == dict(wide.tiles).keys()
    unknown = schedule(PAPER.chain, "mknh", dict(wide.tiles))
    assert search(PAPER, start=[unknown], **FITS) == search(PAPER, **FITS)


@settings(max_examples=15)
@given(chain=chains(max_size=90), seed=st.integers(0, 99))
def test_the_winner_of_any_chain_is_in_its_space(chain, seed):
    space = search_space(chain, A100)
    found = search(space, population=16, seed=seed, **FITS)
    tiles = tuple(size for _, size in found.winner.tiles)
    regions = [region for region in space.regions if region.expression == found.winner.expression]
    assert any(tiles in space.tiles(region) for region in regions)
    assert found.funnel == space.funnel


def test_empty_batches_are_planned_too():
    chain = attention(M=32, N=32, K=32, batch=0)
    assert search(search_space(chain, A100), **FITS).best.time_us == 0
