import math

import numpy as np
import pytest
import sacrebleu

from scripts.testbed.tasks.scores import BLEU, Metric, p_value

REFERENCES = [["the dog runs fast today ."], ["a man in a blue shirt is standing ."], ["two people sit"], ["x"]] * 8
GOOD = [own[0].replace("blue", "red") for own in REFERENCES]
BAD = [" ".join(own[0].split()[::-1]) for own in REFERENCES]


@pytest.mark.parametrize("texts", [GOOD, BAD, [own[0] for own in REFERENCES], [""] * len(REFERENCES)])
def test_bleu_from_sums_is_the_librarys(texts: list[str]) -> None:
    expected = sacrebleu.corpus_bleu(texts, [[own[0] for own in REFERENCES]]).score
    assert BLEU(texts, REFERENCES) == expected


def test_bleu_of_several_references_is_the_librarys() -> None:
    several = [[own[0], own[0] + " or so"] for own in REFERENCES]
    streams = [[own[number] for own in several] for number in range(2)]
    assert BLEU(GOOD, several) == sacrebleu.corpus_bleu(GOOD, streams).score


def test_bootstrap_tells_systems_apart_and_not_a_system_from_itself() -> None:
    good, bad = BLEU.figures(GOOD, REFERENCES), BLEU.figures(BAD, REFERENCES)
    assert p_value(BLEU, good, bad, samples=200, seed=1) == 1 / 201
    assert p_value(BLEU, bad, good, samples=200, seed=1) == 1 / 201
    assert p_value(BLEU, good, good, samples=200, seed=1) == 1.0
    assert p_value(BLEU, good, bad, samples=50, seed=3) == p_value(BLEU, good, bad, samples=50, seed=3)
    with pytest.raises(ValueError, match="baseline: got figures of shape"):
        p_value(BLEU, good, bad[:3], samples=10, seed=1)


@pytest.mark.parametrize("shift", [0.0, 0.1, 0.2, 0.3])
def test_bootstrap_of_a_mean_is_the_normal_test(shift: float) -> None:
    draw, count, samples = np.random.default_rng(4), 400, 4000
    mean = Metric(
        name="mean", unit="x", figures=lambda texts, references: np.empty(0), score=lambda sums: float(sums[0])
    )
    ours, other = draw.normal(shift, 1.0, (count, 1)), draw.normal(0.0, 1.0, (count, 1))
    differences = (ours - other).ravel()
    deviations = abs(differences.sum()) / (differences.std() * count**0.5)
    expected = math.erfc(deviations / 2**0.5)
    found = p_value(mean, ours, other, samples=samples, seed=1)
    assert abs(found - expected) < 5 * (0.25 / samples) ** 0.5
