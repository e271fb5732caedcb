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
    """What every method gets: as many updates as the plain one, or as many as fit in the plain one's time."""
    step_time_ratio: float = 1.0
    """Time of the method's step over the plain one's, as measured by bench experiment=bliss/overhead."""
    average_checkpoints: int = 5
    """Newest checkpoints whose weights are averaged before scoring, for every method alike."""
    length_penalty: float = 1.0
    """Exponent of the length that beam search divides scores by."""
    noise_percent: int = 10
    """Share of the words of the test sources that is perturbed, in percent."""
    noise_seeds: int = 1
    """How often each kind of noise is drawn."""
    bootstrap_samples: int = 1000
    """Test sets drawn for p-values."""

    def __post_init__(self) -> None:
        at_least(self, 1, "average_checkpoints", "bootstrap_samples", "noise_seeds")
        at_least(self, 0, "length_penalty", "noise_percent")
        if self.noise_percent > 100:
            raise ValueError(f"noise_percent: got {self.noise_percent}, accepts 0 to 100")
        if not self.step_time_ratio > 0:
            raise ValueError(f"step_time_ratio: got {self.step_time_ratio}, accepts a number above 0")
        if not self.method or not self.baseline:
            raise ValueError("method, baseline: got an empty text, accepts a method's name")


@dataclass(frozen=True, kw_only=True)
class RivalSection(RivalConfig):
    """A method that BLISS is compared or combined with."""

    enabled: bool = False
    """Off trains without it."""
    kind: RivalKind = "r_drop"
    """Which method."""
