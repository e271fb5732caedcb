"""Whatever splits a source has -> train, valid and test; at most so many rows of each; and their hash."""

import hashlib
import json
from collections.abc import Mapping

import datasets
import pyarrow

from scripts.testbed.corpora.pack import md5_bucket

SPLITS = ("train", "valid", "test")
HELD_OUT_BUCKETS = 20
CONTEXTS_PER_ARTICLE = 5
NUM_VALID_ARTICLES = 5
NUM_TEST_ARTICLES = 5


def three_splits(tables: Mapping[str, datasets.Dataset]) -> dict[str, datasets.Dataset]:
    """Train, valid and test of a source that may lack some.

    Of a single split "all" the articles are shared out. Without valid, a twentieth of train is held out by the md5
    of the first text, so that what shares a text, a premise or a context stays together. Without train, train has no
    rows.

    Args:
        tables: Split -> rows; always with test, or all.

    Returns:
        The three splits, in that order.
    """
    if "all" in tables:
        return by_article(tables["all"])
    if "valid" not in tables:
        return {**held_out(tables["train"]), "test": tables["test"]}
    train = tables["train"] if "train" in tables else rows_at(tables["test"], [])
    return {"train": train, "valid": tables["valid"], "test": tables["test"]}


def held_out(table: datasets.Dataset) -> dict[str, datasets.Dataset]:
    """Train and valid: a row is valid where the md5 of its first text falls into bucket 0 of twenty."""
    (column,) = [column for column in ("source", "context", "text") if column in table.column_names]
    buckets = [md5_bucket(text, HELD_OUT_BUCKETS) for text in table[column]]
    return {
        "train": rows_at(table, [index for index, bucket in enumerate(buckets) if bucket != 0]),
        "valid": rows_at(table, [index for index, bucket in enumerate(buckets) if bucket == 0]),
    }


def by_article(table: datasets.Dataset) -> dict[str, datasets.Dataset]:
    """XQuAD's questions by article: five contexts in a row are one; the order of their md5 shares them out."""
    contexts = list(dict.fromkeys(table["context"]))
    firsts = contexts[::CONTEXTS_PER_ARTICLE]
    order = sorted(firsts, key=lambda context: hashlib.md5(context.encode(), usedforsecurity=False).digest())
    num_train = len(order) - NUM_VALID_ARTICLES - NUM_TEST_ARTICLES
    if num_train < 1 or len(contexts) != CONTEXTS_PER_ARTICLE * len(firsts):
        raise ValueError(f"contexts: {len(contexts)}, expected five for each of the 48 articles; get the set again")
    split_of_first = {
        first: SPLITS[(rank >= num_train) + (rank >= num_train + NUM_VALID_ARTICLES)]
        for rank, first in enumerate(order)
    }
    split_of = {
        context: split_of_first[firsts[index // CONTEXTS_PER_ARTICLE]] for index, context in enumerate(contexts)
    }
    splits = [split_of[context] for context in table["context"]]
    return {name: rows_at(table, [i for i, split in enumerate(splits) if split == name]) for name in SPLITS}


def rows_at(table: datasets.Dataset, indices: list[int]) -> datasets.Dataset:
    """The rows of these numbers, copied, where `select` would keep the whole table and an index into it."""
    taken = table.data.table.take(pyarrow.array(indices, type=pyarrow.int64()))
    return datasets.Dataset(taken, info=datasets.DatasetInfo(features=table.features))


def evenly_spaced(table: datasets.Dataset, max_rows: int | None) -> datasets.Dataset:
    """At most `max_rows` rows from everywhere in the table, in order; the same ones each time."""
    if max_rows is None or max_rows >= len(table):
        return table
    return rows_at(table, [index * len(table) // max_rows for index in range(max_rows)])


def content_sha256(tables: Mapping[str, datasets.Dataset]) -> str:
    """The hash of every canonical value of the three splits: the same for a hub copy and a local copy that agree."""
    digest = hashlib.sha256()
    for split in SPLITS:
        digest.update(f"{split} {len(tables[split])}\n".encode())
        for batch in tables[split].iter(batch_size=1000):
            digest.update(json.dumps(batch, sort_keys=True, ensure_ascii=False).encode())
    return digest.hexdigest()
