"""The eight standard sets as they are kept on the development machines, or wherever QUARTET_DATA says."""

import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from scripts.testbed.data import DATA_SETS, Data, DataConfig, load

FOLDER = Path(os.environ.get("QUARTET_DATA") or Path(__file__).resolve().parents[5] / "shared/data")

SIZES = {
    "sst2": (6920, 872, 1821),
    "cola": (8133, 418, 527),  # 8,551 for training, of which a twentieth is held out
    "mrpc": (3576, 500, 1725),
    "wnut17": (3394, 1009, 1287),
    "xquad": (914, 115, 161),  # 1,190 questions
    "multi30k": (29000, 1014, 1000),
    "jfleg": (0, 754, 747),
    "scitldr": (1992, 619, 618),
}
SHA256 = {
    "multi30k": "76a419a5a35b",
    "sst2": "191d302b9362",
    "cola": "9e38c5adbb55",
    "mrpc": "7fa334cef6d4",
    "wnut17": "a65b69e3ce51",
    "xquad": "e542a76af12f",
    "scitldr": "1ce46c8b5fb4",
    "jfleg": "6f9be6b43d25",
}


@pytest.fixture(scope="module", params=SIZES)
def data(request: pytest.FixtureRequest) -> Data:
    root = FOLDER / request.param
    if not root.is_dir():
        pytest.skip(f"no local copy of {request.param}; set QUARTET_DATA to a folder that holds {request.param}/")
    return load(DataConfig(name=request.param, root=str(root)))


def test_counts(data: Data) -> None:
    assert (len(data.train), len(data.valid), len(data.test)) == SIZES[data.name]


def test_the_hash_is_the_one_that_result_rows_name(data: Data) -> None:
    assert data.sha256[:12] == SHA256[data.name]


def test_every_label_occurs_and_every_row_is_numbered(data: Data) -> None:
    for table in (data.train, data.valid, data.test):
        assert list(table["sentence_id"]) == list(range(len(table)))
    if data.task == "classification":
        assert set(data.train["label"]) == set(data.test["label"]) == {0, 1}
    if data.task == "tagging":
        assert {tag for tags in data.train["tags"] for tag in tags} == set(range(13))


def test_answers_and_references(data: Data) -> None:
    if data.task == "question_answering":
        contexts = [set(table["context"]) for table in (data.train, data.valid, data.test)]
        assert [len(found) for found in contexts] == [190, 25, 25]
        assert len(set.union(*contexts)) == 240
    if data.name == "jfleg":
        assert {len(references) for references in data.test["references"]} == {4}
    if data.task in ("summarization", "correction"):
        assert all(row["target"] == row["references"][0] for row in data.test)


def hub_row(data: Data, row: dict[str, Any]) -> dict[str, Any]:
    """The row as the hub keeps it, where its columns are ours by other names."""
    if data.name == "jfleg":
        return {"sentence": row["source"] + " ", "corrections": [text + " " for text in row["references"]]}
    if data.name == "scitldr":
        return {"source": [row["source"]], "target": row["references"]}
    columns = dict(DATA_SETS[data.name].from_hub.columns)  # type: ignore[union-attr]
    return {hub_column: row[column] for column, hub_column in columns.items()}


def uncut_rows(data: Data) -> list[dict[str, Any]]:
    """The rows of a set that comes as one split, in the order of its file."""
    read = DATA_SETS[data.name].read
    assert read is not None
    return [row for _, row in read(FOLDER / data.name)["all"]]


def test_a_copy_in_the_hubs_format_has_the_same_rows(data: Data, tmp_path: Path) -> None:
    hub = DATA_SETS[data.name].hub
    assert hub is not None
    for ours, theirs in hub.splits.items():
        rows = uncut_rows(data) if ours == "all" else getattr(data, ours)
        content = pyarrow.Table.from_pylist([hub_row(data, row) for row in rows])
        pyarrow.parquet.write_table(content, tmp_path / f"{theirs}-00000-of-00001.parquet")
    copy = load(DataConfig(name=data.name, root=str(tmp_path)))
    assert copy.test[:] == data.test[:]
    assert (copy.sha256 == data.sha256) == ("valid" in hub.splits or "all" in hub.splits)
