"""Chooser: chunk count and strategy for every call of a layer, by trial within what memory allows, or by the model.

A chooser is given numbers that all ranks share (the most tokens and the slowest step of any rank), so all decide alike.
"""

import functools
import logging
import math
import zlib
from dataclasses import dataclass, replace
from typing import Any

from moe_pipeline.config import PipelineConfig, Restore
from moe_pipeline.plan.budget import CHUNK_COUNTS, RESTORES, Budget, footprints, nothing_fits
from moe_pipeline.plan.device import load_device
from moe_pipeline.plan.granularity import Granularity, SearchRules, bucket
from moe_pipeline.plan.ledger import LayerShape
from moe_pipeline.plan.selector import Candidate, candidates, select

logger = logging.getLogger(__name__)

SKEW_STEPS = 4  # the busiest rank's rows over its share, rounded up to quarters
WORTH_TRYING = 1.15  # strategies predicted to be slower than the best by more are not tried


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What all ranks know of a call before it is planned.

    Source: not in the paper, whose prototype looks at one rank's counts.
    """

    tokens: int
    """Most tokens of any rank, B."""
    skew: float = 1.0
    """Rows of the rank that lately received the most, over an equal share."""
    timed: bool = True
    """Whether the call will run backward, so that its time counts."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What is known of one range of batches.

    Source: not in the paper.
    """

    tokens: int
    """The largest number of tokens of the range."""
    restore: Restore
    num_chunks: int
    measured_us: float | None
    """A step of the slowest rank; None where it was taken over from a neighbouring range and not yet timed."""
    predicted_us: float | None
    """The same by the simulator; None without a device file."""


class Chooser:
    """The choices of one layer.

    Args:
        pipeline: What the user fixed, and what is left to choose.
        layer: The layer's sizes; its number of tokens does not matter.
        rules: Of the search.

    Raises:
        DeviceError: If `pipeline.device` cannot be read.

    Source: MPipeMoE (arXiv:2506.22175) sections III-C and III-E.
    """

    def __init__(self, pipeline: PipelineConfig, layer: LayerShape, rules: SearchRules | None = None) -> None:
        self._pipeline, self._layer = pipeline, layer
        self._budget = Budget(device_bytes=pipeline.device_budget_bytes, host_bytes=pipeline.host_budget_bytes)
        self._device = None if pipeline.device is None else load_device(pipeline.device)
        self._counts = CHUNK_COUNTS if pipeline.num_chunks == "auto" else (pipeline.num_chunks,)
        self._restores = RESTORES if pipeline.restore == "auto" else (pipeline.restore,)
        self._searches = {
            restore: Granularity(self._counts, rules, functools.partial(self._guess, restore))
            for restore in self._restores
        }
        self._last: tuple[int, Restore, int] | None = None
        self._fitting: dict[tuple[int, float], dict[Restore, tuple[int, ...]]] = {}
        self._predictions: dict[int, tuple[Candidate, ...]] = {}

    @property
    def trial_steps(self) -> int:
        """Steps that tried what was not known to be the best; not in the paper."""
        return sum(search.trial_steps for search in self._searches.values())

    def choose(self, situation: Situation) -> PipelineConfig:
        """Chunk count and strategy of a call.

        Args:
            situation: The same on every rank.

        Returns:
            The user's settings with nothing left open.

        Raises:
            BudgetError: If no pair fits.

        Source: MPipeMoE (arXiv:2506.22175) sections III-C and III-E.
        """
        key = bucket(situation.tokens)
        skew = math.ceil(situation.skew * SKEW_STEPS) / SKEW_STEPS
        if (key, skew) not in self._fitting:
            self._fitting[key, skew] = self._find_fitting(key, skew)
        fitting = self._fitting[key, skew]
        if self._device is not None and self._pipeline.choose_by == "model":
            within = [one for one in self._predicted(key) if one.num_chunks in fitting.get(one.restore, ())]
            best = select(within, self._budget)
            num_chunks, restore = best.num_chunks, best.restore
        else:
            restore = self._restore(situation.tokens, fitting)
            num_chunks = self._searches[restore].choose(
                situation.tokens, may_try=situation.timed, allowed=fitting[restore]
            )
        self._last = (situation.tokens, restore, num_chunks) if situation.timed else None
        return replace(
            self._pipeline,
            num_chunks=num_chunks,
            restore=restore,
            choose_by="trial",
            device_budget_bytes=None,
            host_budget_bytes=None,
        )

    def observe(self, step_us: float) -> None:
        """Learn how long the call took that was last chosen for.

        Args:
            step_us: Forward and backward of the slowest rank.

        Source: MPipeMoE (arXiv:2506.22175) Algorithm 1.
        """
        if self._last is not None and step_us > 0:
            tokens, restore, num_chunks = self._last
            self._searches[restore].observe(tokens, num_chunks, step_us)
        self._last = None

    def findings(self) -> tuple[Finding, ...]:
        """What every finished search knows, strategy by strategy and batch by batch; not in the paper."""
        found = []
        for restore, search in self._searches.items():
            for key, (num_chunks, measured_us) in search.finished().items():
                own = [] if self._device is None else self._predicted(key)
                same = [one.predicted_us for one in own if (one.num_chunks, one.restore) == (num_chunks, restore)]
                found.append(
                    Finding(
                        tokens=key,
                        restore=restore,
                        num_chunks=num_chunks,
                        measured_us=measured_us,
                        predicted_us=same[0] if same else None,
                    )
                )
        return tuple(found)

    def _restore(self, tokens: int, fitting: dict[Restore, tuple[int, ...]]) -> Restore:
        """The strategy: none where it fits, for all others do more; else each is searched, and then the fastest."""
        if len(fitting) == 1 or "none" in fitting:
            return next(iter(fitting))
        found = {restore: self._searches[restore].found(tokens) for restore in fitting}
        open_ones = [restore for restore, best in found.items() if best is None]
        return open_ones[0] if open_ones else min(found, key=lambda restore: (found[restore] or (0, math.inf))[1])

    def _find_fitting(self, key: int, skew: float) -> dict[Restore, tuple[int, ...]]:
        """Strategy -> the n whose memory fits, the likeliest strategy first."""
        shape = replace(self._layer, tokens=math.ceil(key * skew))
        if self._budget == Budget() and "none" in self._restores:
            fitting: dict[Restore, tuple[int, ...]] = {"none": self._counts}
        else:
            fitting = self._within_budget(shape)
        if shape.num_ranks == 1:  # no message to hide: chunks only save memory
            fitting = {restore: counts[:1] for restore, counts in fitting.items()}
        if "none" in fitting:
            return {"none": fitting["none"]}
        if self._device is None:
            return fitting
        best = {
            one.restore: min(o.predicted_us for o in self._predicted(key) if o.restore == one.restore)
            for one in self._predicted(key)
            if one.restore in fitting and not one.refused
        }
        worth = [restore for restore in best if best[restore] <= min(best.values()) * WORTH_TRYING]
        return {restore: fitting[restore] for restore in sorted(worth, key=best.__getitem__)} or fitting

    def _within_budget(self, shape: LayerShape) -> dict[Restore, tuple[int, ...]]:
        found = footprints(shape, self._counts, self._restores)
        missing = [(footprint, footprint.missing(self._budget)) for footprint in found]
        if all(reason for _, reason in missing):
            raise nothing_fits(missing, self._budget)
        fitting: dict[Restore, tuple[int, ...]] = {}
        for footprint, reason in missing:
            if not reason:
                fitting[footprint.restore] = (*fitting.get(footprint.restore, ()), footprint.num_chunks)
        return fitting

    def _predicted(self, key: int) -> tuple[Candidate, ...]:
        assert self._device is not None, "predictions need a device"
        if key not in self._predictions:
            shape = replace(self._layer, tokens=key)
            self._predictions[key] = candidates(shape, self._device, chunk_counts=self._counts, restores=self._restores)
        return self._predictions[key]

    def _guess(self, restore: Restore, key: int) -> int | None:
        if self._device is None:
            return None
        own = [one for one in self._predicted(key) if one.restore == restore]
        return min(own, key=lambda one: one.predicted_us).num_chunks

    def state(self) -> dict[str, Any]:
        """What is worth keeping for another run.

        Returns:
            Strategy -> its search's state.

        Source: not in the paper.
        """
        return {restore: search.state() for restore, search in self._searches.items() if search.state()}

    def restore(self, state: object) -> None:
        """Begin with what another run found.

        Args:
            state: Of `state`.

        Raises:
            ValueError: If it is not one.

        Source: not in the paper.
        """
        if not isinstance(state, dict):
            raise ValueError(f"state: got {state!r}; accepted is a mapping of strategies")
        for restore, found in state.items():
            if restore not in self._searches:
                raise ValueError(f"state: got the strategy {restore!r}; accepted is one of {list(self._searches)}")
            self._searches[restore].restore(found)

    def digest(self) -> int:
        """A number that is equal on ranks that will choose the same; not in the paper."""
        text = repr([search.digest() for search in self._searches.values()])
        return zlib.crc32(text.encode()) & 0x7FFFFFFF
