import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.testbed.source_noise import KINDS, SEEN, SHUFFLE_RANGE, UNSEEN, lexicon_of, noisy

TEXTS = ["ein mann in einem blauen hemd", "zwei", "", "das  hat zwei blanke"]
LEXICON = ["baum", "haus", "mann"]
WORDS = st.lists(st.text(st.characters(categories=["L"]), min_size=1, max_size=6), max_size=12)


@pytest.mark.parametrize("kind", KINDS)
def test_leaves_texts_alone_at_level_zero_and_is_repeatable(kind: str) -> None:
    assert noisy(TEXTS, kind, share=0.0, seed=1, lexicon=LEXICON) == TEXTS
    first = noisy(TEXTS * 9, kind, share=0.5, seed=1, lexicon=LEXICON)
    assert first == noisy(TEXTS * 9, kind, share=0.5, seed=1, lexicon=LEXICON)
    assert first != noisy(TEXTS * 9, kind, share=0.5, seed=2, lexicon=LEXICON)
    assert noisy(TEXTS, kind, share=0.5, seed=1, lexicon=LEXICON) == first[: len(TEXTS)]


@given(words=WORDS, share=st.sampled_from([0.1, 0.5, 1.0]), seed=st.integers(0, 99))
def test_each_kind_does_what_it_says(words: list[str], share: float, seed: int) -> None:
    def run(kind: str) -> list[str]:
        return KINDS[kind](list(words), share, random.Random(seed), LEXICON)

    assert sorted(run("shuffle")) == sorted(words)
    numbered = KINDS["shuffle"]([str(n) for n in range(len(words))], share, random.Random(seed), LEXICON)
    assert all(abs(int(word) - place) < SHUFFLE_RANGE for place, word in enumerate(numbered))
    replaced = run("replace")
    assert len(replaced) == len(words)
    assert all(new == old or new in LEXICON for new, old in zip(replaced, words, strict=True))
    deleted = run("delete")
    assert (len(deleted) > 0) == (len(words) > 0)
    left = iter(words)
    assert all(word in left for word in deleted)
    assert [word for place, word in enumerate(run("repeat")) if place == 0 or word != run("repeat")[place - 1]] == [
        word for place, word in enumerate(words) if place == 0 or word != words[place - 1]
    ]
    assert [sorted(word) for word in run("swap")] == [sorted(word) for word in words]


def test_kinds_seen_and_unseen_are_all_kinds() -> None:
    assert {*SEEN, *UNSEEN} == set(KINDS)
    assert not set(SEEN) & set(UNSEEN)
    assert lexicon_of(TEXTS) == sorted({"ein", "mann", "in", "einem", "blauen", "hemd", "zwei", "das", "hat", "blanke"})
