"""Paired comparisons over seeds: the mean difference, its interval, how likely chance is, and what would be seen."""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

CONFIDENCE = 0.95
POWER = 0.8
EXACT_PAIRS = 16  # 65,536 sign changes


@dataclass(frozen=True, kw_only=True)
class Paired:
    """One method's figures minus another's, seed by seed."""

    pairs: int
    difference: float
    """Mean."""
    low: float
    """Lower end of the 95 % interval of the mean, by Student's t; nan below two pairs."""
    high: float
    p_value: float
    """Two-sided paired t-test that the mean is 0; nan below two pairs."""
    p_sign_flip: float
    """The same without a normal distribution: share of all sign changes with a mean at least as far from 0."""
    wins: int
    """Pairs whose difference is above 0."""
    losses: int
    """Pairs whose difference is below 0."""
    detectable: float
    """The mean difference that such a test would find four times out of five."""


def paired(own: Sequence[float], other: Sequence[float]) -> Paired:
    """Compare figures of the same seeds.

    Args:
        own: One figure a seed.
        other: The other method's, in the same order.
    """
    differences = [a - b for a, b in zip(own, other, strict=True)]
    count, mean = len(differences), statistics.fmean(differences)
    wins, losses = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    if count < 2:
        nan = math.nan
        return Paired(
            pairs=count, difference=mean, low=nan, high=nan, p_value=nan, p_sign_flip=nan, wins=wins, losses=losses,
            detectable=nan,
        )  # fmt: skip
    error = statistics.stdev(differences) / math.sqrt(count)
    spread = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1))
    certain = 1.0 if mean == 0 else 0.0
    return Paired(
        pairs=count,
        difference=mean,
        low=mean - spread * error,
        high=mean + spread * error,
        p_value=2 * float(stats.t.sf(abs(mean) / error, count - 1)) if error > 0 else certain,
        p_sign_flip=sign_flip(differences),
        wins=wins,
        losses=losses,
        detectable=(spread + float(stats.t.ppf(POWER, count - 1))) * error,
    )


def sign_flip(differences: Sequence[float]) -> float:
    """Two-sided permutation test of a mean of 0 over all changes of signs.

    Raises:
        ValueError: There are too many differences to try all.
    """
    if len(differences) > EXACT_PAIRS:
        raise ValueError(f"differences: got {len(differences)}, accepts at most {EXACT_PAIRS}")
    observed = abs(math.fsum(differences))
    close = observed * (1 - 1e-12)
    signs = itertools.product((1, -1), repeat=len(differences))
    flipped = [abs(math.fsum(s * d for s, d in zip(sign, differences, strict=True))) for sign in signs]
    return sum(value >= close for value in flipped) / len(flipped)


def deviation(values: Sequence[float]) -> float:
    """Standard deviation over seeds; nan for one."""
    return statistics.stdev(values) if len(values) > 1 else math.nan
