import random

from hypothesis import given
from hypothesis import strategies as st

from scripts.testbed.data.grammar_noise import ARTICLES, CLEAN_SHARE, misspelt, noisy

SENTENCES = [f"The man number{n} sits in a house with the dogs of {n % 7} friends ." for n in range(3000)]


def test_a_sentence_always_gets_the_same_errors_and_a_third_or_more_gets_none() -> None:
    found = [noisy(sentence) for sentence in SENTENCES]
    assert found == [noisy(sentence) for sentence in SENTENCES]
    clean = sum(before == after for before, after in zip(SENTENCES, found, strict=True)) / len(found)
    assert CLEAN_SHARE < clean < CLEAN_SHARE + 0.25  # errors may miss a sentence by chance


@given(st.lists(st.sampled_from([*ARTICLES, "in", "house", "dogs", ".", "x1", "is"]), max_size=12))
def test_no_word_is_added_and_signs_stay(words: list[str]) -> None:
    found = noisy(" ".join(words)).split()
    assert len(found) <= len(words)
    assert [word for word in found if word in (".", "x1")] == [word for word in words if word in (".", "x1")]


@given(st.text("abcdefgh", min_size=4, max_size=9), st.integers(0, 99))
def test_a_misspelling_keeps_the_first_letter_and_changes_at_most_one(word: str, seed: int) -> None:
    found = misspelt(word, random.Random(seed))
    assert found[0] == word[0]
    assert abs(len(found) - len(word)) <= 1
    if len(found) == len(word):
        assert sorted(found) == sorted(word)
