"""Adaptive: lets a chooser decide for every call of a layer, on numbers that all ranks have exchanged.

Each rank tells the others, in the message that carries its counts, how many tokens it has now, how unequal its rows and
how long its step were last time; all take the largest and so decide alike. A digest of what each knows goes along:
ranks that would decide differently end with an error before they do.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from moe_pipeline.config import PipelineConfig
from moe_pipeline.plan.chooser import Chooser, Finding, Situation
from moe_pipeline.plan.ledger import LayerShape
from moe_pipeline.run.choices import Choices
from moe_pipeline.run.comm import RankError
from moe_pipeline.run.ranks import ExpertRanks

PER_MILLE = 1000
LONGEST_US = 2**31 - 1  # notes are int32


class StepClock:
    """Times forward and backward of one call, without waiting for other ranks before it.

    Args:
        device: Where the layer computes.

    Source: MPipeMoE (arXiv:2506.22175) section III-C times iterations; backward counts here too.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spent_us = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._passes = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around one pass; not in the paper."""
        if self._cuda:
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            stop.record()
            self._events.append((start, stop))
        else:
            start_ns = time.perf_counter_ns()
            yield
            self._spent_us += (time.perf_counter_ns() - start_ns) / 1e3
        self._passes += 1

    def step_us(self) -> float:
        """Time of both passes; 0 while backward has not run; not in the paper."""
        if self._passes < 2:
            return 0.0
        for start, stop in self._events:
            stop.synchronize()
            self._spent_us += 1e3 * start.elapsed_time(stop)
        self._events = []
        return self._spent_us


class Adaptive:
    """The choices of one layer while it runs.

    Args:
        pipeline: What the user fixed, and what is left to choose.
        name: The layer's name.

    Source: MPipeMoE (arXiv:2506.22175) section III-C; that ranks decide on shared numbers is ours.
    """

    def __init__(self, pipeline: PipelineConfig, name: str) -> None:
        self._pipeline, self._name = pipeline, name
        self._chooser: Chooser | None = None
        self._choices: Choices | None = None
        self._clock: StepClock | None = None
        self._received_per_mille = PER_MILLE
        self.last: PipelineConfig | None = None
        """What was chosen for the last call."""

    def __reduce__(self) -> tuple[type["Adaptive"], tuple[PipelineConfig, str]]:
        return Adaptive, (self._pipeline, self._name)  # a copied or saved layer searches by itself

    @property
    def trial_steps(self) -> int:
        """Steps that tried what was not known to be the best; not in the paper."""
        return 0 if self._chooser is None else self._chooser.trial_steps

    def findings(self) -> tuple[Finding, ...]:
        """What is known so far, measured beside predicted; not in the paper."""
        return () if self._chooser is None else self._chooser.findings()

    def notes(self, tokens: int) -> list[int]:
        """What this rank tells the others before a call.

        Args:
            tokens: Its tokens.

        Returns:
            Four numbers.

        Source: not in the paper.
        """
        step_us = 0.0 if self._clock is None else self._clock.step_us()
        digest = 0 if self._chooser is None else self._chooser.digest()
        return [tokens, self._received_per_mille, min(round(step_us), LONGEST_US), digest]

    def choose(
        self,
        notes: Sequence[Sequence[int]],
        shape: LayerShape,
        *,
        received_rows: int,
        timed: bool,
        ranks: ExpertRanks | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> PipelineConfig:
        """Chunk count and strategy of a call, the same on every rank.

        Args:
            notes: Of every rank.
            shape: The layer; its number of tokens does not matter.
            received_rows: Rows this rank's experts compute in this call; the others hear of them in the next.
            timed: Whether backward will come.
            ranks: Who decides together.
            dtype: What the layer computes in.
            device: Where.

        Returns:
            Settings with nothing left open.

        Raises:
            RankError: If ranks know different things.
            BudgetError: If no choice fits.

        Source: MPipeMoE (arXiv:2506.22175) sections III-C and III-E.
        """
        tokens, received, step_us, digests = (tuple(column) for column in zip(*notes, strict=True))
        if len(set(digests)) > 1:
            raise RankError(
                f"layer {self._name!r}: ranks know different things of it (digests {list(digests)}) and would choose "
                "differently; every rank must call the same layers in the same order from the start"
            )
        if self._chooser is None:
            self._chooser = Chooser(self._pipeline, shape)
            self._choices = Choices.of(self._pipeline, shape, dtype=dtype, device=device)
            self._choices.restore(self._chooser, ranks, device)
        elif self._choices is not None:
            self._chooser.observe(max(step_us))
            self._choices.keep(self._chooser, ranks)
        self._clock = None
        share = max(1, max(tokens) * shape.top_k)
        self._received_per_mille = max(PER_MILLE, received_rows * PER_MILLE // share)
        situation = Situation(tokens=max(tokens), skew=max(received) / PER_MILLE, timed=timed)
        self.last = self._chooser.choose(situation)
        return self.last

    def clock(self, device: torch.device) -> StepClock:
        """A clock for the call that was just chosen for.

        Args:
            device: Where the layer computes.

        Source: not in the paper.
        """
        self._clock = StepClock(device)
        return self._clock
