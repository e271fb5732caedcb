"""The paper's search (Algorithm 1): the model ranks a population, the best are measured, and the next one is bred.

Without a measurement the model's time stands for it. Random and exhaustive search are there as references.

Source: MCFuser (arXiv:2506.22169), Algorithm 1. Ours, as it does not give them: N, n, epsilon and the rates below; that
epsilon is relative to the best time so far, which is kept, and that what cannot run has no children.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from fusion.plan.chain import Chain
from fusion.plan.cpu_model import CpuModel, best_micro
from fusion.plan.device import Device
from fusion.plan.performance_model import PerformanceModel, Prediction
from fusion.plan.placement import Program
from fusion.plan.prune import SharedBytes, shared_limit
from fusion.plan.registers import register_limit
from fusion.plan.schedule import Schedule
from fusion.plan.space import Region, Space, SpaceError, Step

Measure = Callable[[Schedule], float | str]
"""Seconds of a schedule on the device, or the reason why it cannot be taken."""
Pipeline = Callable[[Chain, Schedule, Device], tuple[int, int]]
"""Warps and stages that the kernel of a schedule is run with."""
PATIENCE = 4  # rounds in a row without a gain of epsilon that end a search
NEW_SHARE = 0.1  # of a population, drawn at random beside the children


@dataclass(frozen=True)
class Trial:
    """A candidate that came to be measured."""

    schedule: Schedule
    predicted: Prediction
    measured_us: float | None
    """None without a measurement, or if it was refused."""
    refusal: str | None = None

    @property
    def time_us(self) -> float:
        """What it is judged by: the measured time, without one the predicted time."""
        return self.predicted.total_us if self.measured_us is None else self.measured_us


@dataclass(frozen=True)
class Result:
    """What a search found, and how."""

    best: Trial
    rounds: tuple[tuple[Trial, ...], ...]
    """The candidates that were measured in each round, in the model's order."""
    funnel: tuple[Step, ...]
    considered: int
    """Different candidates that the model ranked."""
    refused: tuple[tuple[str, int], ...]
    """Reason -> candidates that could not be taken: the device's limits, and what the measurement refused."""

    @property
    def winner(self) -> Schedule:
        """The fastest schedule."""
        return self.best.schedule


def search(
    space: Space,
    *,
    measure: Measure | None = None,
    pipeline: Pipeline,
    shared_bytes: SharedBytes,
    population: int = 512,
    top: int = 8,
    epsilon: float = 0.01,
    seed: int = 0,
    start: Sequence[Schedule] = (),
) -> Result:
    """Algorithm 1.

    Args:
        space: Where to search.
        measure: Times a schedule or refuses it; None trusts the model.
        pipeline: Sets a schedule's warps and stages.
        shared_bytes: What a schedule's kernel asks for; more than the device has is refused.
        population: N, the candidates of a round.
        top: n, the candidates of a round that are measured.
        epsilon: Gain of the best time, relative to it, below which a round counts as none.
        seed: Of all random choices: the same seed finds the same winner if `measure` repeats itself.
        start: Schedules that take part from the first round on, as winners of the same chain at other sizes; tiles
            that are not in the space are replaced by the nearest that are.

    Returns:
        The fastest candidate of all rounds, and how it was found.

    Raises:
        SpaceError: Every candidate was refused; the message says why.
        ValueError: A number is out of range.
    """
    for name, value in (("population", population), ("top", top)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if not 0 <= epsilon < 1:
        raise ValueError(f"epsilon={epsilon} must be at least 0 and below 1")
    rng, trials = random.Random(seed), _Trials(space, measure, pipeline, shared_bytes)  # noqa: S311
    candidates = _near(space, start) + _first(space, rng, population)
    rounds: list[tuple[Trial, ...]] = []
    idle = 0
    while idle < PATIENCE:
        before = trials.best
        ranked = trials.ranked(candidates)
        rounds.append(trials.run(ranked, top))
        gained = trials.best is not None and (before is None or trials.best.time_us < (1 - epsilon) * before.time_us)
        idle = 0 if gained else idle + 1
        parents = [candidate for candidate in ranked if not trials.is_refused(candidate)]
        candidates = parents[:top] + _bred(space, rng, parents, trials, population)
    return trials.result(rounds)


def random_search(
    space: Space,
    *,
    measure: Measure | None = None,
    pipeline: Pipeline,
    shared_bytes: SharedBytes,
    budget: int = 128,
    seed: int = 0,
) -> Result:
    """The reference that only draws: `budget` random candidates, all of them measured.

    Args:
        space: Where to search.
        measure: As `search`.
        pipeline: As `search`.
        shared_bytes: As `search`.
        budget: Candidates.
        seed: As `search`.

    Returns:
        The fastest of them.

    Raises:
        SpaceError: Every candidate was refused.
        ValueError: The budget is not positive.
    """
    if budget < 1:
        raise ValueError(f"budget={budget} must be at least 1")
    trials = _Trials(space, measure, pipeline, shared_bytes)
    candidates = _first(space, random.Random(seed), budget)  # noqa: S311
    return trials.result([trials.run(trials.ranked(candidates), budget)])


def exhaustive_search(
    space: Space, *, measure: Measure | None = None, pipeline: Pipeline, shared_bytes: SharedBytes
) -> Result:
    """The reference that misses nothing: every candidate is measured, or ranked by the model if nothing measures.

    Args:
        space: Where to search.
        measure: As `search`.
        pipeline: As `search`.
        shared_bytes: As `search`.

    Returns:
        The fastest of all.

    Raises:
        SpaceError: Every candidate was refused.
    """
    trials = _Trials(space, measure, pipeline, shared_bytes)
    ranked = trials.ranked(_all(space))
    return trials.result([trials.run(ranked, 1 if measure is None else len(ranked))])


@dataclass(frozen=True)
class _Candidate:
    region: Region
    tiles: tuple[int, ...]

    @property
    def schedule(self) -> Schedule:
        letters = [letter for letter, _ in self.region.choices]
        return Schedule(self.region.expression, tuple(zip(letters, self.tiles, strict=True)))


class _Trials:
    """Ranks and measures candidates, each once, and remembers all of it."""

    def __init__(self, space: Space, measure: Measure | None, pipeline: Pipeline, shared_bytes: SharedBytes) -> None:
        self.space, self.measure, self.pipeline, self.shared_bytes = space, measure, pipeline, shared_bytes
        self.model = (CpuModel if space.device.kind == "cpu" else PerformanceModel)(space.chain, space.device)
        self.predictions: dict[_Candidate, Prediction] = {}
        self.done: dict[_Candidate, str | None] = {}
        self.kernels: dict[tuple[Program, tuple[int, ...]], str | None] = {}
        self.refused: dict[str, int] = {}
        self.best: Trial | None = None

    def is_refused(self, candidate: _Candidate) -> bool:
        return self.done.get(candidate) is not None

    def ranked(self, candidates: Iterable[_Candidate]) -> list[_Candidate]:
        """Different candidates, the fastest by the model first."""
        unique = list(dict.fromkeys(candidates))
        for candidate in unique:
            if candidate not in self.predictions:
                self.predictions[candidate] = self.model.predict(candidate.schedule)
        return sorted(unique, key=lambda candidate: self.predictions[candidate].total_us)

    def run(self, ranked: Sequence[_Candidate], number: int) -> tuple[Trial, ...]:
        """Measure the first ones that fit and were not measured yet; one kernel under two names is one candidate."""
        found: list[Trial] = []
        for candidate in ranked:
            if len(found) == number:
                break
            if candidate in self.done:
                continue
            trial = self._try(candidate)
            if trial is not None:
                found.append(trial)
                if trial.refusal is None and (self.best is None or trial.time_us < self.best.time_us):
                    self.best = trial
        return tuple(found)

    def result(self, rounds: Sequence[tuple[Trial, ...]]) -> Result:
        if self.best is None:
            reasons = "".join(f"\n    {number}: {reason}" for reason, number in self.refused.items())
            steps = "\n".join(str(step) for step in self.space.funnel)
            raise SpaceError(
                f"no candidate can be taken for {self.space.chain} on {self.space.device.name}:\n{steps}\n"
                f"of {len(self.predictions)} that were ranked, refused:{reasons}"
            )
        return Result(self.best, tuple(rounds), self.space.funnel, len(self.predictions), tuple(self.refused.items()))

    def _try(self, candidate: _Candidate) -> Trial | None:
        chain, device = self.space.chain, self.space.device
        plain = candidate.schedule
        kernel = (plain.program(chain), candidate.tiles)
        if kernel in self.kernels:
            self.done[candidate] = self.kernels[kernel]
            return None
        warps, stages = self.pipeline(chain, plain, device)
        schedule = replace(plain, num_warps=warps, num_stages=stages)
        if device.kind == "cpu":
            schedule = replace(schedule, micro=best_micro(chain, schedule, device))
        shared = shared_limit(chain, schedule, device, self.shared_bytes)
        refusal = shared or register_limit(chain, schedule, device)
        outcome = None if self.measure is None or refusal else self.measure(schedule)
        if isinstance(outcome, int | float) and not 0 <= outcome < math.inf:
            outcome = f"measured {outcome} s"
        reason = outcome if isinstance(outcome, str) else refusal
        self.done[candidate] = self.kernels[kernel] = reason
        if reason is not None:
            counted = "too many registers for sums" if refusal else reason
            counted = f"above {device.shared_bytes_per_block} bytes of shared memory" if shared else counted
            self.refused[counted] = self.refused.get(counted, 0) + 1
        if refusal:
            return None
        measured_us = None if outcome is None or isinstance(outcome, str) else 1e6 * outcome
        return Trial(schedule, self.predictions[candidate], measured_us, reason)


def _near(space: Space, start: Sequence[Schedule]) -> list[_Candidate]:
    """The candidates whose tiles are nearest to those of given schedules."""
    found = []
    for schedule in start:
        given = dict(schedule.tiles)
        for region in space.regions:
            if region.expression == schedule.expression:
                tiles = tuple(
                    min(sizes, key=lambda size: abs(size - given[letter])) for letter, sizes in region.choices
                )
                if all(tile in space.sizes(region, tiles, index) for index, tile in enumerate(tiles)):
                    found.append(_Candidate(region, tiles))
    return found


def _first(space: Space, rng: random.Random, number: int) -> list[_Candidate]:
    """Random candidates, or all if there are no more than asked for."""
    return _all(space) if space.candidates <= number else [_drawn(space, rng) for _ in range(number)]


def _all(space: Space) -> list[_Candidate]:
    return [_Candidate(region, tiles) for region in space.regions for tiles in space.tiles(region)]


def _drawn(space: Space, rng: random.Random) -> _Candidate:
    """A random candidate: the loops, in random order, take one of the sizes that leave room for the least of others."""
    region = rng.choice(space.regions)
    order = list(range(len(region.choices)))
    rng.shuffle(order)
    tiles = tuple(sizes[0] for _, sizes in region.choices)
    for index in order:
        tiles = _changed(space, rng, region, tiles, index)
    return _Candidate(region, tiles)


def _changed(space: Space, rng: random.Random, region: Region, tiles: tuple[int, ...], index: int) -> tuple[int, ...]:
    """The tiles with one size replaced by any that fits beside the others: the present one does."""
    return (*tiles[:index], rng.choice(space.sizes(region, tiles, index)), *tiles[index + 1 :])


def _bred(
    space: Space, rng: random.Random, parents: Sequence[_Candidate], trials: _Trials, number: int
) -> list[_Candidate]:
    """The next population: children of the faster ones by the model, and some new ones."""
    if not parents:
        return [_drawn(space, rng) for _ in range(number)]
    weights = [1 / max(trials.predictions[parent].total_us, 1e-9) for parent in parents]
    chosen = rng.choices(parents, weights, k=number)
    return [_drawn(space, rng) if rng.random() < NEW_SHARE else _mutated(space, rng, parent) for parent in chosen]


def _mutated(space: Space, rng: random.Random, parent: _Candidate) -> _Candidate:
    """One tile size changed, sometimes two; a new candidate where there is no other."""
    region, tiles = parent.region, parent.tiles
    free = [index for index, (_, sizes) in enumerate(region.choices) if len(sizes) > 1]
    if not free:
        return _drawn(space, rng)
    for index in rng.sample(free, min(len(free), rng.choice((1, 1, 2)))):
        tiles = _changed(space, rng, region, tiles, index)
    return _Candidate(region, tiles)
