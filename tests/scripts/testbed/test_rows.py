import dataclasses
import json
import math
from pathlib import Path

import pytest

from scripts.testbed import rows
from scripts.testbed.rows import Result, Row, headlines


def result(experiment: str = "quartet/demo", value: float = 1.5) -> Result:
    return Result(
        experiment=experiment,
        kind="measured",
        rows=(
            Row(provider="moe", metric="bleu", unit="sacreBLEU", value=value),
            Row(provider='a "b", c', metric="step", unit="us", value=1 / 3, low=0.1, high=1e-9),
        ),
        summary={"bleu": value, "nothing": math.nan, "none": None},
        seed=1,
        data_sha256="ab" * 32,
        commit="abc",
        device="A CPU, 2 cores",
        versions={"python": "3.11", "torch": "2"},
        date="2026-01-01",
    )


def test_the_json_line_is_one_line_with_the_promised_keys() -> None:
    line = result().json_line()
    content = json.loads(line)
    assert "\n" not in line
    assert {"experiment", "kind", "rows", "summary", "commit", "device", "versions"} <= content.keys()
    assert content["rows"][0] == {
        "provider": "moe", "metric": "bleu", "unit": "sacreBLEU", "value": 1.5, "low": None, "high": None,
        "kind": "measured",
    }  # fmt: skip
    assert content["summary"]["nothing"] is None


def test_a_row_of_another_kind_says_so() -> None:
    printed = Row(provider="moe, paper", metric="bleu", unit="sacreBLEU", value=2.0, kind="paper")
    found = dataclasses.replace(result(), rows=(*result().rows, printed))
    assert [row.kind for row in rows.recorded(found)] == ["measured", "measured", "paper"]
    assert [row["kind"] for row in json.loads(found.json_line())["rows"]] == ["measured", "measured", "paper"]


def test_headlines_are_rows_with_units_and_without_text() -> None:
    summary = {"ratio": 0.5, "cost_percent": 7.0, "seconds_cold": 2.5, "steps": 3, "name": "x", "missing": None}
    found = headlines("ours", summary)
    assert [(row.metric, row.unit, row.value) for row in found] == [
        ("ratio", "ratio", 0.5),
        ("cost_percent", "%", 7.0),
        ("seconds_cold", "s", 2.5),
        ("steps", "count", 3.0),
    ]
    assert [row.kind for row in headlines("ours", {"paper_ratio": 0.5, "ratio": 0.5})] == ["paper", None]


def test_rows_survive_a_file_exactly(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    rows.write_rows(path, rows.recorded(result()))
    assert rows.read_rows(path) == rows.recorded(result())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("provider", "povider", 1), "columns are"),
        (lambda text: text.replace("1.5", "high", 1), "line 2: could not convert"),
        (lambda text: text.replace("1.5", "nan", 1), "line 2: got 'nan', expected a finite number"),
        (lambda text: text.replace("1.5", "", 1), "line 2: could not convert"),
        (lambda text: text + "quartet/demo,moe\n", "line 4: expected"),
        (lambda text: text.replace("2026-01-01", "2026-01-01,more", 1), "line 2: expected"),
    ],
)
def test_a_damaged_file_is_an_error_that_names_the_line(tmp_path: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "rows.csv"
    rows.write_rows(path, rows.recorded(result()))
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=message):
        rows.read_rows(path)


def test_recording_replaces_the_experiments_own_rows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    rows.record(result("quartet/other", value=7.0))
    rows.record(result(value=1.0))
    path = rows.record(result(value=2.0))
    assert path.name == "quartet.csv"
    found = {(row.experiment, row.value) for row in rows.read_rows(path) if row.metric == "bleu"}
    assert found == {("quartet/demo", 2.0), ("quartet/other", 7.0)}


def test_committed_rows_are_readable() -> None:
    for path in rows.RESULTS.glob("*.csv"):
        assert rows.read_rows(path), path
