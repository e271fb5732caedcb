import math
import random

import numpy as np
import pytest
import sacrebleu

from scripts.testbed.tasks.scores import BLEU, GLEU, ROUGE, Metric, gleu_score, p_value

REFERENCES = [["the dog runs fast today ."], ["a man in a blue shirt is standing ."], ["two people sit"], ["x"]] * 8
SOURCES = ["quelle"] * len(REFERENCES)
GOOD = [own[0].replace("blue", "red") for own in REFERENCES]
BAD = [" ".join(own[0].split()[::-1]) for own in REFERENCES]


@pytest.mark.parametrize("texts", [GOOD, BAD, [own[0] for own in REFERENCES], [""] * len(REFERENCES)])
def test_bleu_from_sums_is_the_librarys(texts: list[str]) -> None:
    expected = sacrebleu.corpus_bleu(texts, [[own[0] for own in REFERENCES]]).score
    assert BLEU(texts, REFERENCES, SOURCES) == expected


def test_bleu_of_several_references_is_the_librarys() -> None:
    several = [[own[0], own[0] + " or so"] for own in REFERENCES]
    streams = [[own[number] for own in several] for number in range(2)]
    assert BLEU(GOOD, several, SOURCES) == sacrebleu.corpus_bleu(GOOD, streams).score


def test_bootstrap_tells_systems_apart_and_not_a_system_from_itself() -> None:
    good, bad = BLEU.figures(GOOD, REFERENCES, SOURCES), BLEU.figures(BAD, REFERENCES, SOURCES)
    assert p_value(BLEU, good, bad, samples=200, seed=1) == 1 / 201
    assert p_value(BLEU, bad, good, samples=200, seed=1) == 1 / 201
    assert p_value(BLEU, good, good, samples=200, seed=1) == 1.0
    assert p_value(BLEU, good, bad, samples=50, seed=3) == p_value(BLEU, good, bad, samples=50, seed=3)
    with pytest.raises(ValueError, match="baseline: got figures of shape"):
        p_value(BLEU, good, bad[:3], samples=10, seed=1)


@pytest.mark.parametrize("shift", [0.0, 0.1, 0.2, 0.3])
def test_bootstrap_of_a_mean_is_the_normal_test(shift: float) -> None:
    draw, count, samples = np.random.default_rng(4), 400, 4000
    mean = Metric(name="mean", unit="x", figures=lambda *texts: np.empty(0), score=lambda sums: float(sums[0]))
    ours, other = draw.normal(shift, 1.0, (count, 1)), draw.normal(0.0, 1.0, (count, 1))
    differences = (ours - other).ravel()
    deviations = abs(differences.sum()) / (differences.std() * count**0.5)
    expected = math.erfc(deviations / 2**0.5)
    found = p_value(mean, ours, other, samples=samples, seed=1)
    assert abs(found - expected) < 5 * (0.25 / samples) ** 0.5


def test_rouge_is_the_librarys_mean_over_sentences_with_the_best_reference() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    several = [[own[0], "nothing like it"] for own in REFERENCES]
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    expected = [scorer.score(own[0], text) for text, own in zip(GOOD, REFERENCES, strict=True)]
    sums = ROUGE.figures(GOOD, several, SOURCES).sum(0)
    for name, kind in (("rouge_1", "rouge1"), ("rouge_2", "rouge2")):
        assert ROUGE.parts[name](sums) == 100 * np.array([scores[kind].fmeasure for scores in expected]).sum() / len(
            GOOD
        )
    assert 0 < ROUGE.parts["rouge_2"](sums) < ROUGE.parts["rouge_1"](sums) <= 100
    assert ROUGE([""] * len(GOOD), several, SOURCES) == 0


def drawn_gleu(texts: list[str], references: list[list[str]], sources: list[str], *, draws: int) -> list[float]:
    """As the metric's authors do: one reference a sentence is drawn, many times."""
    found = []
    for number in range(draws):
        draw = random.Random(number * 101)
        chosen = [[own[draw.randrange(len(own))]] for own in references]
        found.append(gleu_score(GLEU.figures(texts, chosen, sources).sum(0)))
    return found


def test_gleu_rewards_corrections_and_punishes_errors_that_stay() -> None:
    sources = ["He go to school every day .", "I has a dog in the house ."] * 20
    references = [["He goes to school every day .", "He goes to the school every day ."],
                  ["I have a dog in the house .", "I have a dog at home ."]] * 20  # fmt: skip
    corrected = [own[0] for own in references]
    scores = [GLEU(texts, references, sources) for texts in (corrected, sources, [text[::-1] for text in sources])]
    assert scores[0] > scores[1] > scores[2]
    assert scores[2] == 0
    single = [[own[0]] for own in references]
    assert GLEU(corrected, single, sources) == 100.0
    drawn = drawn_gleu(corrected, references, sources, draws=200)
    assert abs(np.mean(drawn) - scores[0]) < 5 * np.std(drawn) / 200**0.5 + np.std(drawn) ** 2 / 100
