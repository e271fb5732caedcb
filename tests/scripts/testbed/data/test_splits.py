import hashlib
import itertools

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.testbed.data.splits import content_sha256, evenly_spaced, three_splits


def table(*texts: str, column: str = "text") -> datasets.Dataset:
    features = datasets.Features({column: datasets.Value("string")})
    return datasets.Dataset.from_dict({column: list(texts)}, features=features)


@pytest.mark.parametrize("column", ["text", "source", "context"])
def test_a_twentieth_of_train_is_held_out_and_equal_texts_stay_together(column: str) -> None:
    texts = [f"text {number}" for number in range(2000)] * 2
    splits = three_splits({"train": table(*texts, column=column), "test": table("t", column=column)})
    train, valid = list(splits["train"][column]), list(splits["valid"][column])
    assert sorted(train + valid) == sorted(texts)
    assert not set(train) & set(valid)
    assert set(valid) == {t for t in texts if int(hashlib.md5(t.encode()).hexdigest(), 16) % 20 == 0}
    assert list(splits["test"][column]) == ["t"]


def test_train_may_be_missing() -> None:
    splits = three_splits({"valid": table("v"), "test": table("t")})
    assert list(splits) == ["train", "valid", "test"]
    assert len(splits["train"]) == 0
    assert splits["train"].features == splits["test"].features


def test_articles_are_not_torn_apart() -> None:
    contexts = [f"article {number // 10} paragraph {number // 2 % 5}" for number in range(480)]
    splits = three_splits({"all": table(*contexts, column="context")})
    articles = {name: {context.split()[1] for context in rows["context"]} for name, rows in splits.items()}
    assert {name: len(found) for name, found in articles.items()} == {"train": 38, "valid": 5, "test": 5}
    assert len(set.union(*articles.values())) == 48
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 380, "valid": 50, "test": 50}


def test_contexts_that_are_not_five_an_article() -> None:
    with pytest.raises(ValueError, match="contexts: 239"):
        three_splits({"all": table(*(f"context {number}" for number in range(239)), column="context")})


@given(size=st.integers(1, 200), most=st.one_of(st.none(), st.integers(1, 250)))
def test_rows_are_kept_from_everywhere(size: int, most: int | None) -> None:
    kept = [int(text) for text in evenly_spaced(table(*map(str, range(size))), most)["text"]]
    assert len(kept) == min(size, most or size)
    assert kept == sorted(set(kept))
    gaps = {after - before for before, after in itertools.pairwise(kept)}
    assert max(gaps, default=1) - min(gaps, default=1) <= 1


@pytest.mark.parametrize(
    "other",
    [
        {"train": ("a", "b", "c"), "valid": (), "test": ("d",)},
        {"train": ("a",), "valid": ("b",), "test": ("d",)},
        {"train": ("b", "a"), "valid": (), "test": ("d",)},
        {"train": ("a", "b "), "valid": (), "test": ("d",)},
    ],
)
def test_the_hash_sees_values_order_and_splits(other: dict[str, tuple[str, ...]]) -> None:
    one = {"train": table("a", "b"), "valid": table(), "test": table("d")}
    again = {"test": table("d"), "valid": table(), "train": table("a", "b")}
    assert content_sha256(one) == content_sha256(again)
    assert content_sha256(one) != content_sha256({split: table(*texts) for split, texts in other.items()})
