from pathlib import Path

import pytest

from scripts.testbed.data import DATA_SETS, DataConfig, DataError, load


def test_an_unknown_name_is_answered_with_the_names() -> None:
    with pytest.raises(DataError, match=r"data\.name: got 'imdb', accepts .*libreoffice_help_de_en, .*vader_movie"):
        load(DataConfig(name="imdb"))


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    for name in ("sst2", "conll2003", "vader_movie"):
        with pytest.raises(DataError, match=rf"data {name}: .*none: no such folder.*Fix: data\.root=PATH"):
            load(DataConfig(name=name, root=str(tmp_path / "none")))


@pytest.mark.parametrize(
    ("name", "origin"),
    [
        ("bea2019", "https://www.cl.cam.ac.uk/research/nl/bea2019st"),
        ("conll14", "https://www.cl.cam.ac.uk/.* and https://www.comp.nus.edu.sg"),
        ("debian_synopses", "python -m scripts.testbed.corpora.extract_debian_synopses --out PATH"),
        ("brown_jfleg", "https://github.com/keisks/jfleg"),
    ],
)
def test_a_set_that_neither_ships_nor_is_on_the_hub_says_where_it_comes_from(name: str, origin: str) -> None:
    with pytest.raises(DataError, match=rf"data\.root: got null.*Fix: data\.root=PATH of such a folder, from {origin}"):
        load(DataConfig(name=name))


def test_an_empty_folder_is_no_reason_to_take_other_data(tmp_path: Path) -> None:
    for name in DATA_SETS:
        with pytest.raises(DataError, match="no such file"):
            load(DataConfig(name=name, root=str(tmp_path)))


def test_limits_keep_rows_from_everywhere_and_change_the_hash() -> None:
    whole = load(DataConfig(name="vader_movie"))
    some = load(DataConfig(name="vader_movie", max_train=100, max_eval=10))
    assert (len(some.train), len(some.valid), len(some.test)) == (100, 10, 10)
    assert list(some.train["sentence_id"]) == list(range(100))
    assert some.train["text"][99] == whole.train["text"][99 * len(whole.train) // 100]
    assert some.sha256 != whole.sha256
    assert some.sha256 == load(DataConfig(name="vader_movie", max_train=100, max_eval=10)).sha256
    assert some.sha256 != load(DataConfig(name="vader_movie", max_train=100)).sha256


@pytest.mark.parametrize(
    ("name", "sha256"),
    [
        ("libreoffice_help_de_en", "e22b00461bb6"),
        ("vader_movie", "c15f16af179d"),
    ],
)
def test_the_shipped_corpora_have_the_hashes_that_result_rows_name(name: str, sha256: str) -> None:
    assert load(DataConfig(name=name)).sha256.startswith(sha256)


def test_what_the_record_says() -> None:
    data = load(DataConfig(name="vader_movie", max_train=5, max_eval=5))
    assert (data.name, data.task, data.licence) == ("vader_movie", "classification", "MIT")
    assert data.label_names == ("negative", "positive")
    assert data.train.features["label"].names == ["negative", "positive"]
    assert data.source == "shipped corpus; split by md5 of the text"


def test_names_are_unique_and_every_set_can_be_read() -> None:
    for name, data_set in DATA_SETS.items():
        assert data_set.name == name
        assert data_set.read is not None or data_set.hub is not None
        assert (data_set.hub is None) == (data_set.from_hub is None)
        assert bool(data_set.label_names) == (data_set.task in ("classification", "tagging"))
