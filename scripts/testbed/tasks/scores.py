"""Scores of generated text as sums over sentences, so that test sets can be drawn again from what each one adds.

N  sentence
F  figure of a sentence
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import sacrebleu
from numpy.typing import NDArray

Figures = NDArray[np.float64]
NUM_ORDERS = 4


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A score of a corpus."""

    name: str
    """Name in rows."""
    unit: str
    """Unit, with the library."""
    figures: Callable[[Sequence[str], Sequence[Sequence[str]]], Figures]
    """Hypotheses, and all references of each -> (N, F), what each sentence adds."""
    score: Callable[[Figures], float]
    """(F,), a sum over sentences -> the score."""

    def __call__(self, hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        """The score of a corpus."""
        return self.score(self.figures(hypotheses, references).sum(0))


def bleu_figures(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> Figures:
    """N-gram matches and counts of each order, and both lengths."""
    metric = sacrebleu.BLEU(effective_order=True)  # asked for by the library where it scores sentences
    scores = [metric.sentence_score(text, list(own)) for text, own in zip(hypotheses, references, strict=True)]
    return np.array([[*score.counts, *score.totals, score.sys_len, score.ref_len] for score in scores], dtype=float)


def bleu_score(sums: Figures) -> float:
    """Corpus BLEU of the sums, as sacreBLEU has it."""
    counts, totals = sums[:NUM_ORDERS], sums[NUM_ORDERS : 2 * NUM_ORDERS]
    score = sacrebleu.BLEU.compute_bleu(
        correct=[int(value) for value in counts],
        total=[int(value) for value in totals],
        sys_len=int(sums[-2]),
        ref_len=int(sums[-1]),
        smooth_method="exp",
    )
    return float(score.score)


BLEU = Metric(name="bleu", unit="sacreBLEU", figures=bleu_figures, score=bleu_score)


def p_value(metric: Metric, ours: Figures, baseline: Figures, *, samples: int, seed: int) -> float:
    """Share of drawn test sets on which a difference as large would arise by chance: paired bootstrap, two-sided.

    Differences of drawn sets are centred before their size is taken; sacreBLEU takes the size first, which finds more
    differences significant, also between systems that are equally good.

    Args:
        metric: Makes a score of sums.
        ours: (N, F) of one system.
        baseline: (N, F) of the other, on the same sentences.
        samples: Test sets to draw.
        seed: Seed of the draw.

    Returns:
        The probability, at least 1 / (samples + 1).

    Raises:
        ValueError: The systems were not scored on the same sentences.
    """
    if ours.shape != baseline.shape:
        raise ValueError(f"baseline: got figures of shape {baseline.shape}, accepts those of ours, {ours.shape}")
    draw = np.random.default_rng(seed)
    differences = np.empty(samples)
    for sample in range(samples):
        rows = draw.integers(len(ours), size=len(ours))
        differences[sample] = metric.score(ours[rows].sum(0)) - metric.score(baseline[rows].sum(0))
    true = abs(metric.score(ours.sum(0)) - metric.score(baseline.sum(0)))
    exceeded = np.abs(differences - differences.mean()) >= true
    return float((exceeded.sum() + 1) / (samples + 1))
