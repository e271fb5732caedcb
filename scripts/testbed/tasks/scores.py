"""Scores of generated text as sums over sentences, so that test sets can be drawn again from what each one adds.

N  sentence
F  figure of a sentence
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import sacrebleu
from numpy.typing import NDArray
from rouge_score import rouge_scorer

Figures = NDArray[np.float64]
NUM_ORDERS = 4
ROUGE_KINDS = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A score of a corpus."""

    name: str
    """Name in rows."""
    unit: str
    """Unit, with the library."""
    figures: Callable[[Sequence[str], Sequence[Sequence[str]], Sequence[str]], Figures]
    """Hypotheses, all references of each, and sources -> (N, F), what each sentence adds."""
    score: Callable[[Figures], float]
    """(F,), a sum over sentences -> the score."""
    parts: Mapping[str, Callable[[Figures], float]] = field(default_factory=lambda: MappingProxyType({}))
    """Further scores of the same sums, by name."""

    def __call__(self, hypotheses: Sequence[str], references: Sequence[Sequence[str]], sources: Sequence[str]) -> float:
        """The score of a corpus."""
        return self.score(self.figures(hypotheses, references, sources).sum(0))

    def by_name(self, sums: Figures) -> dict[str, float]:
        """The score and its parts of a sum over sentences."""
        return {self.name: self.score(sums), **{part: of(sums) for part, of in self.parts.items()}}


def bleu_figures(hypotheses: Sequence[str], references: Sequence[Sequence[str]], sources: Sequence[str]) -> Figures:
    """N-gram matches and counts of each order, and both lengths; sources are not read."""
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


def rouge_figures(hypotheses: Sequence[str], references: Sequence[Sequence[str]], sources: Sequence[str]) -> Figures:
    """F-measures of ROUGE-1, -2 and -L against the reference that fits best by ROUGE-1, and 1 for the sentence."""
    scorer = rouge_scorer.RougeScorer(ROUGE_KINDS, use_stemmer=True)
    rows = []
    for text, own in zip(hypotheses, references, strict=True):
        found = [scorer.score(reference, text) for reference in own]
        best = max(found, key=lambda scores: scores["rouge1"].fmeasure)
        rows.append([*(best[kind].fmeasure for kind in ROUGE_KINDS), 1.0])
    return np.array(rows, dtype=float).reshape(len(rows), len(ROUGE_KINDS) + 1)


def gleu_figures(hypotheses: Sequence[str], references: Sequence[Sequence[str]], sources: Sequence[str]) -> Figures:
    """N-gram matches less those that only the source shares, counts, and both lengths, as means over references.

    The means are what the reference script estimates by drawing one reference a sentence 500 times.
    """
    rows = []
    for text, own, source in zip(hypotheses, references, sources, strict=True):
        rows.append(np.mean([_gleu_of(text.split(), reference.split(), source.split()) for reference in own], axis=0))
    return np.array(rows, dtype=float).reshape(len(rows), 2 * NUM_ORDERS + 2)


def _gleu_of(text: list[str], reference: list[str], source: list[str]) -> list[float]:
    matches, totals = [], []
    for order in range(1, NUM_ORDERS + 1):
        own, wanted, given = (_ngrams(words, order) for words in (text, reference, source))
        only_given = Counter({ngram: count for ngram, count in given.items() if ngram not in wanted})
        matches.append(max((own & wanted).total() - (own & only_given).total(), 0))
        totals.append(max(len(text) + 1 - order, 0))
    return [*matches, *totals, len(text), len(reference)]


def _ngrams(words: list[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[place : place + order]) for place in range(len(words) + 1 - order))


def gleu_score(sums: Figures) -> float:
    """Corpus GLEU of the sums, in percent; 0 where an order has no match.

    Source: Napoles et al., Ground Truth for Grammatical Error Correction Metrics, and their correction of 2016.
    """
    matches, totals = sums[:NUM_ORDERS], sums[NUM_ORDERS : 2 * NUM_ORDERS]
    if not matches.all() or not totals.all():
        return 0.0
    brevity = min(0.0, 1.0 - float(sums[-1] / sums[-2]))
    return 100.0 * math.exp(brevity + float(np.log(matches / totals).mean()))


def _mean_of(kind: str) -> Callable[[Figures], float]:
    place = ROUGE_KINDS.index(kind)
    return lambda sums: 100.0 * float(sums[place] / max(sums[-1], 1.0))


ROUGE = Metric(
    name="rouge_l",
    unit="ROUGE F, percent",
    figures=rouge_figures,
    score=_mean_of("rougeL"),
    parts=MappingProxyType({"rouge_1": _mean_of("rouge1"), "rouge_2": _mean_of("rouge2")}),
)
GLEU = Metric(name="gleu", unit="GLEU, percent", figures=gleu_figures, score=gleu_score)
OF_TASK: Mapping[str, Metric] = MappingProxyType({"translation": BLEU, "summarization": ROUGE, "correction": GLEU})


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
