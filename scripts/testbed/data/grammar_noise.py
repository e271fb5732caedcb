"""Artificial errors of learners of English, for training where no learners' texts are at hand.

A third of the sentences stay as they are. In the others a word is misspelt, an article or a preposition is dropped or
exchanged, or a final s is lost or added, each at the rate below, which leaves another sixth alone by chance; the
sentence alone decides where.
"""

import random

CLEAN_SHARE = 1 / 3
RATES = {"spelling": 0.05, "article": 0.25, "preposition": 0.15, "ending": 0.06}
ARTICLES = ("a", "an", "the")
PREPOSITIONS = ("in", "on", "at", "of", "for", "to", "with", "by", "from", "about", "into")
SHORTEST_MISSPELT = 4


def noisy(sentence: str) -> str:
    """The sentence with artificial errors, the same ones each time.

    Args:
        sentence: Tokens between blanks.
    """
    draw = random.Random(sentence)  # noqa: S311
    if draw.random() < CLEAN_SHARE:
        return sentence
    words = [noisy_word(word, draw) for word in sentence.split()]
    return " ".join(word for word in words if word)


def noisy_word(word: str, draw: random.Random) -> str:
    """A word with at most one error; empty where it is dropped."""
    for name, kinds in (("article", ARTICLES), ("preposition", PREPOSITIONS)):
        if word in kinds:
            return draw.choice(("", *kinds)) if draw.random() < RATES[name] else word
    if not word.isalpha():
        return word
    if draw.random() < RATES["ending"]:
        return word.removesuffix("s") if word.endswith("s") and len(word) > 2 else f"{word}s"
    if len(word) >= SHORTEST_MISSPELT and draw.random() < RATES["spelling"]:
        return misspelt(word, draw)
    return word


def misspelt(word: str, draw: random.Random) -> str:
    """A word in which a letter behind the first is lost, doubled, or changes places with its neighbour."""
    at = draw.randrange(1, len(word) - 1)
    return draw.choice(
        (word[:at] + word[at + 1 :], word[: at + 1] + word[at:], word[:at] + word[at + 1] + word[at] + word[at + 2 :])
    )
