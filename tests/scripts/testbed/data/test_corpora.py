"""The shipped corpora are what their README says, and no training sentence is tested on."""

import hashlib
import re
from pathlib import Path

import pytest

from scripts.testbed.corpora.pack import md5_bucket, write_corpus
from scripts.testbed.data import Data, DataConfig, load
from scripts.testbed.data.load import CORPORA

README_ROW = re.compile(r"\| (train|valid|test) \| ([\d,]+) \| ([\d,]+) \| `([0-9a-f]{64})` \|")
NAMES = ("libreoffice_help_de_en", "vader_movie", "brown_gec")
FIRST_COLUMN = {"libreoffice_help_de_en": "source", "vader_movie": "text", "brown_gec": "target"}


@pytest.fixture(scope="module", params=NAMES)
def corpus(request: pytest.FixtureRequest) -> Data:
    return load(DataConfig(name=request.param))


def normalised(text: str) -> str:
    return "".join(character for character in text.casefold() if character.isalnum())


def test_counts_sizes_and_hashes_are_those_of_the_readme(corpus: Data) -> None:
    folder = CORPORA / corpus.name
    rows = README_ROW.findall((folder / "README.md").read_text())
    assert [split for split, *_ in rows] == ["train", "valid", "test"]
    for split, count, num_bytes, sha256 in rows:
        packed = (folder / f"{split}.tsv.xz").read_bytes()
        assert len(getattr(corpus, split)) == int(count.replace(",", ""))
        assert len(packed) == int(num_bytes.replace(",", ""))
        assert hashlib.sha256(packed).hexdigest() == sha256


def test_the_licence_is_beside_it(corpus: Data) -> None:
    licence = (CORPORA / corpus.name / "LICENSE.md").read_text()
    words = {"MPL-2.0": "Mozilla Public License", "MIT": "The MIT License"}
    assert words.get(corpus.licence, corpus.licence) in licence


def test_no_sentence_is_in_two_splits(corpus: Data) -> None:
    columns = [column for column in ("source", "target", "text") if column in corpus.train.column_names]
    splits = [
        {normalised(text) for column in columns for text in table[column]}
        for table in (corpus.train, corpus.valid, corpus.test)
    ]
    assert splits[0].isdisjoint(splits[1])
    assert splits[0].isdisjoint(splits[2])
    assert splits[1].isdisjoint(splits[2])


def test_no_artefacts_of_markup(corpus: Data) -> None:
    for table in (corpus.train, corpus.valid, corpus.test):
        for text in table[FIRST_COLUMN[corpus.name]]:
            assert text == " ".join(text.split())
            assert not re.search(r"<[^>]*\b(class|dir|hidden|itemprop)=|</(span|p|div)>|&nbsp;|\ufffd|\xad", text), text


def test_the_sentiment_splits_follow_the_md5_of_the_text() -> None:
    corpus = load(DataConfig(name="vader_movie"))
    assert {md5_bucket(text, 10) for text in corpus.test["text"]} == {0}
    assert {md5_bucket(text, 10) for text in corpus.valid["text"]} == {1}
    assert {md5_bucket(text, 10) for text in corpus.train["text"]} == set(range(2, 10))
    assert [sum(table["label"]) for table in (corpus.train, corpus.valid, corpus.test)] == [4044, 479, 472]


def test_the_translation_pairs_keep_the_filters_of_their_readme() -> None:
    corpus = load(DataConfig())
    for table in (corpus.train, corpus.valid, corpus.test):
        for german, english in zip(table["source"], table["target"], strict=True):
            lengths = sorted((len(german.split()), len(english.split())))
            assert 3 <= lengths[0] <= lengths[1] <= min(80, 2.2 * lengths[0])
            assert german != english


def test_packing_is_reproducible(tmp_path: Path) -> None:
    splits = {"train": [("a", "b")], "test": [("ä", "")]}
    for folder in ("one", "two"):
        write_corpus(tmp_path / folder, splits, num_rows={"train": 1, "test": 1})
    for split in splits:
        assert (tmp_path / f"one/{split}.tsv.xz").read_bytes() == (tmp_path / f"two/{split}.tsv.xz").read_bytes()


def test_packing_refuses_other_counts_and_broken_cells(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"counted .*expected"):
        write_corpus(tmp_path / "out", {"train": [("a", "b")]}, num_rows={"train": 2})
    for cell in ("a\tb", "a\nb"):
        with pytest.raises(ValueError, match="tab or a line break"):
            write_corpus(tmp_path / "out", {"train": [(cell, "b")]}, num_rows={"train": 1})
    assert not (tmp_path / "out").exists()
