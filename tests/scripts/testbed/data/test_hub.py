"""The hub's format, from a hub that is played by a function here, and from folders of its files."""

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

from scripts.testbed.data import DATA_SETS, DataConfig, DataError, load
from scripts.testbed.data.hub import HubSource, Pick

ANSWERS = {"text": ["cat"], "answer_start": [4]}
SQUAD = {"id": "1", "title": "t", "context": "the cat", "question": "who?", "answers": ANSWERS}
PAPER = {"source": ["One.", "Two."], "source_labels": [0, 1], "paper_id": "p", "target": ["Short."]}
PAIR = {"sentence1": "a", "sentence2": "b", "label": 1, "idx": 0}
NLI = {"premise": "a", "hypothesis": "b", "label": 2, "idx": 0}
TAGGED = {"id": "0", "tokens": ["a", "b"], "ner_tags": [0, 3]}

# data set -> a row as the hub keeps it
ROWS: dict[str, dict[str, Any]] = {
    "multi30k": {"en": "a", "de": "b"},
    "sst2": {"idx": 0, "sentence": "a", "label": 1},
    "cola": {"idx": 0, "sentence": "a", "label": 1},
    "mrpc": PAIR,
    "wnut17": TAGGED,
    "scitldr": PAPER,
    "jfleg": {"sentence": "a ", "corrections": ["b ", "c "]},
    "qnli": {"question": "a", "sentence": "b", "label": 1, "idx": 0},
    "rte": PAIR,
    "wnli": PAIR,
    "qqp": {"question1": "a", "question2": "b", "label": 1, "idx": 0},
    "stsb": {**PAIR, "label": 4.5},
    "mnli": NLI,
    "boolq": {"question": "a", "passage": "b", "label": 1, "idx": 0},
    "cb": NLI,
    "mnli_mismatched": NLI,
    "copa": {"premise": "a", "choice1": "b", "choice2": "c", "question": "cause", "label": 1, "idx": 0},
    "multirc": {"paragraph": "a", "question": "b", "answer": "c", "idx": {"paragraph": 0}, "label": 1},
    "rte_super": {**NLI, "label": 1},
    "wic": {"word": "w", "sentence1": "a", "sentence2": "b", "start1": 0, "end1": 1, "label": 1, "idx": 0},
    "wsc": {"text": "a", "span1_index": 0, "span2_index": 3, "span1_text": "b", "span2_text": "it", "label": 0},
    "record": {
        "passage": "Anna and Bert met.\n@highlight\nBert left",
        "query": "@placeholder was alone",
        "entities": ["Anna", "Bert"],
        "entity_spans": {"text": ["Anna", "Bert"], "start": [0, 9], "end": [4, 13]},
        "answers": ["Bert", "Carl", "Anna"],
        "idx": {"passage": 3, "query": 7},
    },
    "squad": SQUAD,
    "squad_v2": {**SQUAD, "answers": {"text": [], "answer_start": []}},
    "conll2003": {**TAGGED, "pos_tags": [1, 2]},
    "iwslt14_de_en": {"translation": {"de": "a", "en": "b"}},
    "wmt14_en_de": {"translation": {"de": "a", "en": "b"}},
    "wmt16_ro_en": {"translation": {"ro": "a", "en": "b"}},
    "cnn_dailymail": {"article": "a", "highlights": "b", "id": "0"},
}
# data set -> text and text_pair, where they are made of several columns
TEXTS = {
    "copa": ("a What was the cause?", "b Or: c"),
    "multirc": ("a", "b c"),
    "wic": ("w: a", "b"),
    "wsc": ("a", "it refers to b."),
}
FIRST_COLUMNS = {"multi30k": ("b", "a"), "wmt14_en_de": ("b", "a")}


def hub_rows(name: str, count: int = 60) -> list[dict[str, Any]]:
    return [{**ROWS[name]} for _ in range(count)]


def play_hub(monkeypatch: pytest.MonkeyPatch, tables: dict[str, list[dict[str, Any]]]) -> list[tuple[Any, ...]]:
    """Lets `load_dataset` answer with these rows; returns the list of calls that it will fill."""
    calls: list[tuple[Any, ...]] = []

    def answer(path: str, config: str | None, **keywords: Any) -> datasets.DatasetDict:
        calls.append((path, config, keywords["revision"], keywords["data_dir"]))
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in tables.items()})

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "load_dataset", answer)
    return calls


def test_every_set_of_the_hub_is_tried_here() -> None:
    assert sorted([*ROWS, "xquad"]) == sorted(name for name, data_set in DATA_SETS.items() if data_set.hub)


@pytest.mark.parametrize("name", ROWS)
def test_each_set_from_the_hub_equals_a_folder_of_its_files(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = DATA_SETS[name].hub
    assert hub is not None
    calls = play_hub(monkeypatch, {split: hub_rows(name) for split in hub.splits.values()})
    for split in hub.splits.values():
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(hub_rows(name)), tmp_path / f"{split}-00000-of-00001.parquet"
        )
    fetched, local = load(DataConfig(name=name)), load(DataConfig(name=name, root=str(tmp_path)))
    assert calls == [(hub.path, hub.config, hub.revision, hub.folder)]
    assert fetched.sha256 == local.sha256
    assert fetched.test.features == local.test.features
    assert fetched.test[7] == local.test[7]
    assert local.test[7]["sentence_id"] == 7
    assert fetched.source.startswith("hub:")
    if local.task in ("translation", "classification") and name not in TEXTS:
        first, second = FIRST_COLUMNS.get(name, ("a", "b"))
        row = local.test[0]
        assert row.get("source", row.get("text")) == first
        assert row.get("target", row.get("text_pair", second)) == second


@pytest.mark.parametrize("name", TEXTS)
def test_texts_made_of_columns(name: str) -> None:
    make = DATA_SETS[name].from_hub
    assert make is not None
    text, text_pair = TEXTS[name]
    assert make(ROWS[name]) == {"text": text, "text_pair": text_pair, "label": ROWS[name]["label"]}
    lacking = {column: value for column, value in ROWS[name].items() if value not in ("a", "w", "b")}
    with pytest.raises(ValueError, match="no such column of text; the columns are"):
        make(lacking)


def test_answers_of_record_stand_where_the_passage_has_them_first() -> None:
    make = DATA_SETS["record"].from_hub
    assert make is not None
    row = make(ROWS["record"])
    assert row["answers"] == {"text": ["Bert", "Anna"], "answer_start": [9, 0]}
    assert row["id"] == "7"
    assert make({**ROWS["record"], "answers": ["Carl"]})["answers"] == {"text": [], "answer_start": []}


def test_a_question_of_copa_is_one_of_two() -> None:
    make = DATA_SETS["copa"].from_hub
    assert make is not None
    assert make({**ROWS["copa"], "question": "effect"})["text"] == "a What was the effect?"
    with pytest.raises(ValueError, match="question: 'why' is neither cause nor effect"):
        make({**ROWS["copa"], "question": "why"})


def test_xquad_is_split_by_article_from_the_hub_too(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{**SQUAD, "id": str(n), "context": f"the cat {n // 2}"} for n in range(480)]
    play_hub(monkeypatch, {"validation": rows})
    data = load(DataConfig(name="xquad"))
    assert (len(data.train), len(data.valid), len(data.test)) == (380, 50, 50)


def test_jsonl_csv_and_folders_a_split(tmp_path: Path) -> None:
    rows = [{"sentence": f'say "{n}",\nplease', "label": n % 2} for n in range(60)]
    (tmp_path / "jsonl").mkdir()
    (tmp_path / "csv/sst2").mkdir(parents=True)
    for split in ("train", "validation"):
        (tmp_path / f"parquet/{split}").mkdir(parents=True)
        for part in (0, 1):
            half = pyarrow.Table.from_pylist(rows[30 * part : 30 * part + 30])
            pyarrow.parquet.write_table(half, tmp_path / f"parquet/{split}/000{part}.parquet")
        (tmp_path / f"jsonl/{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with (tmp_path / f"csv/sst2/{split}.csv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, ("sentence", "label"))
            writer.writeheader()
            writer.writerows(rows)
    hashes = {load(DataConfig(name="sst2", root=str(tmp_path / kind))).sha256 for kind in ("parquet", "jsonl", "csv")}
    assert len(hashes) == 1


def test_the_sets_own_layout_goes_before_the_hubs(tmp_path: Path) -> None:
    for file in ("train.tsv", "dev.tsv", "test.tsv"):
        (tmp_path / file).write_text("own\t1\n")
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text('{"sentence": "hub", "label": 1}\n')
    assert load(DataConfig(name="sst2", root=str(tmp_path))).test["text"][0] == "own"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("validation.jsonl", '{"sentence": "a", "label": 1}\n{"sentence": "b", "label": -1}\n', "jsonl:2: label: -1"),
        (
            "validation.jsonl",
            '{"text": "a", "label": 1}\n',
            "jsonl:1: sentence: no such column; the columns are text, label",
        ),
        ("validation.csv", "sentence,label\na,7\n", "csv:2: label: '7'"),
        ("validation.parquet", "PAR1", "validation.parquet: not a parquet file"),
        ("other.jsonl", "", r"validation\*\.parquet or .*: no such file"),
    ],
)
def test_a_broken_hub_file_is_named(tmp_path: Path, file: str, content: str, message: str) -> None:
    (tmp_path / "train.jsonl").write_text('{"sentence": "a", "label": 1}\n')
    (tmp_path / file).write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        load(DataConfig(name="sst2", root=str(tmp_path)))
    assert "train*, validation* as parquet, jsonl or csv with the columns of hub:stanfordnlp/sst2" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("wnut17", ("hub:leondz/wnut_17", "train.conll", "token TAB tag")),
        ("iwslt14_de_en", ("hub:bbaaaa/iwslt14-de-en", "train*, validation*, test* as parquet, jsonl or csv")),
        ("wmt14_en_de", ("hub:wmt/wmt14/de-en", "as parquet, jsonl or csv")),
        ("wmt16_ro_en", ("hub:wmt/wmt16/ro-en", "as parquet, jsonl or csv")),
        ("cnn_dailymail", ("hub:abisee/cnn_dailymail/3.0.0", "as parquet, jsonl or csv")),
    ],
)
def test_without_a_network_the_error_comes_at_once_with_path_layout_and_fix(
    name: str, expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route")

    def download(*_: object, **__: object) -> None:
        pytest.fail("asked for a download although the hub did not answer")

    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    monkeypatch.setattr(datasets, "load_dataset", download)
    with pytest.raises(DataError) as caught:
        load(DataConfig(name=name))
    message = str(caught.value)
    for part in (f"data {name}:", "no route", "Fix: data.root=PATH", *expected):
        assert part in message
    assert caught.value.__cause__ is not None
    assert isinstance(caught.value.__cause__.__cause__, OSError)


def test_offline_mode_uses_the_hubs_cache_without_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    play_hub(monkeypatch, {split: hub_rows("multi30k") for split in ("train", "validation", "test")})
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: True)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: pytest.fail("asked the hub"))
    assert len(load(DataConfig(name="multi30k")).train) == 60


def test_a_split_that_the_hub_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    play_hub(monkeypatch, {"train": hub_rows("multi30k")})
    with pytest.raises(DataError, match="no split test, validation; the hub has train"):
        load(DataConfig(name="multi30k"))


def test_pick_enters_records() -> None:
    pick = Pick((("x", "a.b"), ("y", "c")))
    assert pick({"a": {"b": 1}, "c": 2, "d": 3}) == {"x": 1, "y": 2}
    with pytest.raises(ValueError, match=r"a\.b: no such column; the columns are a, c"):
        pick({"a": 1, "c": 2})


def test_a_source_prints_as_its_place_on_the_hub() -> None:
    assert str(HubSource(path="a/b", config="c", splits={})) == "hub:a/b/c"
    assert str(HubSource(path="a/b", folder="d", splits={})) == "hub:a/b/d"
    assert str(HubSource(path="a/b", splits={})) == "hub:a/b"
