"""The section of experiments that compare training objectives: who takes part, and how each is scored."""

from dataclasses import dataclass
from typing import Literal

from bliss import RivalConfig
from bliss.config import RivalKind
from configs.typed import at_least


@dataclass(frozen=True, kw_only=True)
class ComparisonSection:
    """One run of a comparison: a method and a seed, scored as all others are."""

    enabled: bool = False
    """Whether this is a comparison; else the quartet is trained."""
    method: str = "plain"
    """The method's name in rows and tables."""
    baseline: str = "plain"
    """The method that p-values are against; its run of the same seed comes first."""
    budget: Literal["updates", "time"] = "updates"
    """What every method gets: as many updates as the plain one, or as many as fit in the plain one's time by the step
    times that bench experiment=bliss/overhead recorded."""
    average_checkpoints: int = 5
    """Newest checkpoints whose weights are averaged before scoring, for every method alike."""
    length_penalty: float = 1.0
    """Exponent of the length that beam search divides scores by."""
    noise_percents: tuple[int, ...] = (10,)
    """Shares of the words of the test sources that are perturbed, in percent; one for a table, several for curves."""
    noise_seeds: int = 1
    """How often each kind of noise is drawn."""
    probes: bool = False
    """Whether what the encoder's states tell of a sentence is probed."""
    bootstrap_samples: int = 1000
    """Test sets drawn for p-values."""
    errant: bool | None = None
    """Whether corrections are scored by errant's F0.5 too; null does so where its packages are installed."""

    def __post_init__(self) -> None:
        at_least(self, 1, "average_checkpoints", "bootstrap_samples", "noise_seeds")
        at_least(self, 0, "length_penalty")
        if not all(0 < percent <= 100 for percent in self.noise_percents):
            raise ValueError(
                f"noise_percents: got {list(self.noise_percents)}, accepts a list of numbers from 1 to 100"
            )
        if not self.method or not self.baseline:
            raise ValueError("method, baseline: got an empty text, accepts a method's name")


@dataclass(frozen=True, kw_only=True)
class RivalSection(RivalConfig):
    """A method that BLISS is compared or combined with."""

    enabled: bool = False
    """Off trains without it."""
    kind: RivalKind = "r_drop"
    """Which method."""
