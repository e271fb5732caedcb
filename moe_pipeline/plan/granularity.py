"""Granularity: which number of chunks n suits how many tokens B, found while training.

Ranges of B belong to each n; a B inside one is answered at once. Outside, real steps are timed, only with numbers
between those of the neighbouring ranges, walking from the likeliest until the time gets worse. When steps begin to take
clearly longer or shorter than they did, the network or its neighbours have changed: all ranges are searched anew, each
from what was best.

Nothing here knows of ranks: give the same calls the same numbers and every rank decides the same.
"""

import json
import statistics
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

BUCKETS_PER_OCTAVE = 4  # numbers of tokens within a fifth of each other share a search


@dataclass(frozen=True, kw_only=True)
class SearchRules:
    """When to try, when to move and when to stop.

    Source: MPipeMoE (arXiv:2506.22175) Algorithm 1 and MPMoE (IEEE TPDS 2024) section 4.1; the numbers are ours.
    """

    trials: int = 2
    """Timed steps per n; the fastest counts."""
    better: float = 0.01
    """A neighbour must be faster by this fraction to be moved to."""
    drift: float = 0.1
    """Steps that are slower or faster than they were by this fraction ..."""
    patience: int = 3
    """... so many times in a row start a new search."""
    allowance: int = 24
    """Steps that may be trials at first, and after every change ..."""
    budget: float = 0.02
    """... and the fraction of all steps beyond them."""


@dataclass
class _Case:
    """What is known of the numbers of tokens of one bucket."""

    chosen: int | None = None
    """n, once the search is over."""
    start: int | None = None
    """Where a search begins: what was best before something changed."""
    times_us: dict[int, list[float]] = field(default_factory=dict)
    """n -> trials, as if with the largest B of the bucket."""
    reference_us: float | None = None
    """What a step of the chosen n takes."""
    recent_us: deque[float] = field(default_factory=deque)


class Granularity:
    """The search for one strategy.

    Args:
        chunk_counts: The n to choose among, ascending.
        rules: Of the search.
        guess: B -> the n to begin with, where a model knows; None begins beside the nearest range.

    Source: MPipeMoE (arXiv:2506.22175) Algorithm 1; MPMoE (IEEE TPDS 2024) Algorithm 1; n = 1, hysteresis, the budget
    of trials and the new search after a change are ours.
    """

    def __init__(
        self,
        chunk_counts: Sequence[int],
        rules: SearchRules | None = None,
        guess: Callable[[int], int | None] | None = None,
    ) -> None:
        self._counts, self._rules, self._guess = tuple(chunk_counts), rules or SearchRules(), guess
        self._cases: dict[int, _Case] = {}
        self._steps = self._trial_steps = self._allowance_from = 0
        self.searches = 0
        """Changes that started a new search."""

    @property
    def trial_steps(self) -> int:
        """Steps that tried an n that was not known to be the best; not in the paper."""
        return self._trial_steps

    def choose(self, tokens: int, *, may_try: bool = True, allowed: Sequence[int] | None = None) -> int:
        """The n for the next step.

        Args:
            tokens: B.
            may_try: Whether this step will be timed, so that it may be a trial.
            allowed: The n that fit in memory; None allows all.

        Returns:
            One of the n that are allowed.

        Raises:
            ValueError: If none is.

        Source: MPipeMoE (arXiv:2506.22175) Algorithm 1.
        """
        counts = [n for n in self._counts if allowed is None or n in allowed]
        if not counts:
            raise ValueError(f"allowed: got {allowed}; accepted is at least one of {self._counts}")
        key = bucket(tokens)
        case = self._cases.setdefault(key, _Case())
        if case.chosen is None:
            self._settle(key, case, counts)
        if case.chosen is not None:
            return _nearest(counts, case.chosen)
        best = self._best(case, counts, key)
        trial = self._next_trial(case, self._between(key, counts), best)
        if trial is None or trial == best or not (may_try and self._may_spend()):
            return best
        self._trial_steps += 1
        return trial

    def observe(self, tokens: int, num_chunks: int, step_us: float) -> None:
        """Learn how long a step took.

        Args:
            tokens: B of a step that `choose` was asked for.
            num_chunks: The n it used.
            step_us: Its forward and backward, the slowest rank's.

        Source: MPipeMoE (arXiv:2506.22175) Algorithm 1.
        """
        self._steps += 1
        key = bucket(tokens)
        case = self._cases.setdefault(key, _Case())
        scaled_us = step_us * key / max(1, tokens)  # what the largest B of the bucket would take
        if case.chosen is None:
            case.times_us.setdefault(num_chunks, []).append(scaled_us)
        elif num_chunks == case.chosen:
            self._watch(case, scaled_us)

    def found(self, tokens: int) -> tuple[int, float] | None:
        """What a finished search knows.

        Args:
            tokens: B.

        Returns:
            The best n and its time for the largest B of the bucket; None while either is not known.

        Source: not in the paper.
        """
        case = self._cases.get(bucket(tokens), _Case())
        return None if case.chosen is None or case.reference_us is None else (case.chosen, case.reference_us)

    def finished(self) -> dict[int, tuple[int, float | None]]:
        """Every bucket whose search is over, with its n and, once timed, its time; not in the paper."""
        return {
            key: (case.chosen, case.reference_us)
            for key, case in sorted(self._cases.items())
            if case.chosen is not None
        }

    def _settle(self, key: int, case: _Case, counts: list[int]) -> None:
        """End a search that has nothing left to try."""
        between = self._between(key, counts)
        if len(between) == 1:
            case.chosen = between[0]
        elif case.times_us and self._next_trial(case, between, self._best(case, between, key)) is None:
            case.chosen = self._best(case, between, key)
            case.reference_us = min(case.times_us[case.chosen])
        if case.chosen is not None:
            case.times_us = {}

    def _next_trial(self, case: _Case, between: list[int], best: int) -> int | None:
        """The n to time next: the best known, then its neighbours, the finer one first; None where all are known."""
        position = between.index(_nearest(between, best))
        around = [between[position], *between[position + 1 : position + 2], *between[max(0, position - 1) : position]]
        return next((n for n in around if len(case.times_us.get(n, ())) < self._rules.trials), None)

    def _best(self, case: _Case, counts: list[int], key: int) -> int:
        """The fastest n so far; a neighbour must be clearly faster than where the search began."""
        start = _nearest(counts, self._start(case, key))
        known = {n: min(times) for n, times in case.times_us.items() if n in counts}
        if not known:
            return start
        fastest = min(known, key=known.__getitem__)
        if start in known and known[start] <= known[fastest] * (1 + self._rules.better):
            return start
        return fastest

    def _start(self, case: _Case, key: int) -> int:
        if case.start is not None:
            return case.start
        guess = None if self._guess is None else self._guess(key)
        if guess is not None:
            return guess
        done = {other: case.chosen for other, case in self._cases.items() if case.chosen is not None}
        nearest = min(done, key=lambda other: max(other, key) / max(1, min(other, key)), default=None)
        return self._counts[0] if nearest is None else done[nearest]

    def _between(self, key: int, counts: list[int]) -> list[int]:
        """The n between those of the neighbouring ranges; best n never falls as B grows."""
        done = {other: case.chosen for other, case in self._cases.items() if case.chosen is not None}
        low = max((n for other, n in done.items() if other <= key), default=counts[0])
        high = min((n for other, n in done.items() if other >= key), default=counts[-1])
        found = [n for n in counts if low <= n <= high]
        return found or [_nearest(counts, low)]

    def _may_spend(self) -> bool:
        since = self._trial_steps - self._allowance_from
        return since < self._rules.allowance + self._rules.budget * self._steps

    def _watch(self, case: _Case, step_us: float) -> None:
        """Notice that steps have changed for good."""
        case.recent_us.append(step_us)
        if len(case.recent_us) > self._rules.patience:
            case.recent_us.popleft()
        if len(case.recent_us) < self._rules.patience:
            return
        if case.reference_us is None:
            case.reference_us = statistics.median(case.recent_us)
        limit = 1 + self._rules.drift
        slower = min(case.recent_us) > case.reference_us * limit
        faster = max(case.recent_us) < case.reference_us / limit
        if slower or faster:
            self._start_over()

    def _start_over(self) -> None:
        self.searches += 1
        self._allowance_from = self._trial_steps
        self._cases = {
            key: _Case(start=case.chosen if case.chosen is not None else case.start)
            for key, case in self._cases.items()
        }

    def state(self) -> dict[str, Any]:
        """What is worth keeping for another run: every B whose search is over.

        Returns:
            A mapping of JSON types.

        Source: not in the paper.
        """
        return {
            str(key): {"num_chunks": num_chunks, "reference_us": reference_us}
            for key, (num_chunks, reference_us) in self.finished().items()
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Begin with what another run found.

        Args:
            state: Of `state`.

        Raises:
            ValueError: If it is not one.

        Source: not in the paper.
        """
        self._cases |= {int(key): _restored(entry, self._counts) for key, entry in state.items()}

    def digest(self) -> int:
        """A number that is equal on ranks that will decide the same; not in the paper."""
        cases = [(key, asdict(case) | {"recent_us": list(case.recent_us)}) for key, case in sorted(self._cases.items())]
        text = json.dumps([self._steps, self._trial_steps, cases], sort_keys=True)
        return zlib.crc32(text.encode()) & 0x7FFFFFFF


def bucket(tokens: int) -> int:
    """The representative of all numbers of tokens that share a search: the largest of them.

    Args:
        tokens: B.

    Source: our definition; the paper keeps every B apart.
    """
    if tokens < 2:
        return max(0, tokens)
    octave = 1 << (tokens - 1).bit_length() - 1
    return next(
        bound
        for part in range(1, BUCKETS_PER_OCTAVE + 1)
        if (bound := octave + octave * part // BUCKETS_PER_OCTAVE) >= tokens
    )


def _nearest(counts: Sequence[int], num_chunks: int) -> int:
    return min(counts, key=lambda n: (abs(n - num_chunks), n))


def _restored(entry: object, counts: tuple[int, ...]) -> _Case:
    if not isinstance(entry, dict) or entry.keys() != {"num_chunks", "reference_us"}:
        raise ValueError(f"state: got {entry!r}; accepted is an object with num_chunks and reference_us")
    chosen, reference_us = entry["num_chunks"], entry["reference_us"]
    if chosen not in counts:
        raise ValueError(f"state: got num_chunks={chosen!r}; accepted is one of {counts}")
    if reference_us is not None and not (isinstance(reference_us, float) and reference_us > 0):
        raise ValueError(f"state: got reference_us={reference_us!r}; accepted is a time above 0, or null")
    return _Case(chosen=chosen, reference_us=reference_us)
