"""Noise on test sources, by kind and share of words: kinds that training may have seen, and kinds it never saw."""

import random
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

SHUFFLE_RANGE = 3

Noise = Callable[[list[str], float, random.Random, Sequence[str]], list[str]]


def shuffle(words: list[str], share: float, draw: random.Random, lexicon: Sequence[str]) -> list[str]:
    """Each word, with the given probability, moves up to three places to the right."""
    scores = [place + (draw.random() < share) * draw.random() * SHUFFLE_RANGE for place in range(len(words))]
    return [words[place] for place in sorted(range(len(words)), key=scores.__getitem__)]


def replace(words: list[str], share: float, draw: random.Random, lexicon: Sequence[str]) -> list[str]:
    """Each word becomes a random word of the training sources."""
    return [draw.choice(lexicon) if draw.random() < share else word for word in words]


def delete(words: list[str], share: float, draw: random.Random, lexicon: Sequence[str]) -> list[str]:
    """Each word vanishes; the first one stays where all would."""
    return [word for word in words if draw.random() >= share] or words[:1]


def repeat(words: list[str], share: float, draw: random.Random, lexicon: Sequence[str]) -> list[str]:
    """Each word stands twice."""
    return [copy for word in words for copy in [word] * (2 if draw.random() < share else 1)]


def swap(words: list[str], share: float, draw: random.Random, lexicon: Sequence[str]) -> list[str]:
    """In each word of two letters or more two neighbouring characters change places."""
    swapped = []
    for word in words:
        if len(word) > 1 and draw.random() < share:
            at = draw.randrange(len(word) - 1)
            word = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
        swapped.append(word)
    return swapped


SEEN: Mapping[str, Noise] = MappingProxyType({"shuffle": shuffle, "replace": replace})
UNSEEN: Mapping[str, Noise] = MappingProxyType({"delete": delete, "repeat": repeat, "swap": swap})
KINDS: Mapping[str, Noise] = MappingProxyType({**SEEN, **UNSEEN})


def noisy(texts: Sequence[str], kind: str, *, share: float, seed: int, lexicon: Sequence[str]) -> list[str]:
    """Perturb every text; the seed and the text's number alone decide how.

    Args:
        texts: Sentences of words between blanks.
        kind: A key of KINDS.
        share: Probability that a word is perturbed; 0 leaves every text as it is.
        seed: Which of the noises of this kind.
        lexicon: Words that replacements are drawn from.
    """
    return [
        " ".join(KINDS[kind](text.split(), share, random.Random(f"{seed}/{kind}/{number}"), lexicon))  # noqa: S311
        if share > 0
        else text
        for number, text in enumerate(texts)
    ]


def lexicon_of(texts: Sequence[str]) -> list[str]:
    """Every word of some texts once, in order."""
    return sorted({word for text in texts for word in text.split()})
