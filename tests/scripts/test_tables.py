"""The README's tables are what the committed rows say."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.tables import methods_table, regenerate, runs_table, table
from scripts.testbed.rows import REPOSITORY, RecordedRow

ROW = RecordedRow(
    experiment="quartet/demo", provider="moe", metric="bleu", unit="sacreBLEU", value=31.234, low=None, high=None,
    kind="measured", seed=1, data_sha256="", commit="abc", device="a CPU", versions="", date="2026-01-01",
)  # fmt: skip
PAGE = "before\n<!-- table: quartet/demo -->\nold\n<!-- end -->\nafter\n"


def test_only_what_stands_between_the_markers_changes() -> None:
    page = regenerate(PAGE, rows=[ROW])
    assert page == f"before\n<!-- table: quartet/demo -->\n{table([ROW])}<!-- end -->\nafter\n"
    assert regenerate(page, rows=[ROW]) == page
    assert "| moe | bleu | - | 31.2 | sacreBLEU | measured | a CPU | abc |" in page


def test_a_marker_may_choose_rows_by_pattern() -> None:
    page = PAGE.replace("quartet/demo -->", "quartet/demo only: moe/bl* dense/* -->")
    rows = [ROW, dataclasses.replace(ROW, metric="loss"), dataclasses.replace(ROW, provider="dense", metric="loss")]
    assert f"-->\n{table([rows[0], rows[2]])}<!-- end -->" in regenerate(page, rows=rows)
    with pytest.raises(ValueError, match=r"no row of quartet/demo matches 'dense/\*'"):
        regenerate(page, rows=rows[:2])


def test_a_timing_shows_its_percentiles() -> None:
    timed = dataclasses.replace(ROW, metric="step_time", value=1234.5, low=1200.0, high=1300.0)
    assert "| 1,234 (1,200-1,300) |" in table([timed])


def test_runs_of_several_seeds_become_a_mean_with_a_deviation() -> None:
    seeds = [dataclasses.replace(ROW, seed=seed, value=value) for seed, value in ((1, 30.0), (2, 31.0), (3, 32.0))]
    other = dataclasses.replace(ROW, provider="other", metric="p_value", value=0.25)
    again = dataclasses.replace(other, seed=2, value=0.5, device="a GPU", commit="def")
    page = PAGE.replace("table: quartet/demo", "runs: quartet/demo columns: bleu p_value")
    written = regenerate(page, rows=[*seeds, again, other])
    assert "| moe | 3 | 31.0 +- 1 | - |" in written
    assert "| other | 2 | - | 0.25, 0.5 |" in written
    assert "Measured on a CPU at abc; a GPU at def: other." in written
    assert regenerate(written, rows=[*seeds, again, other]) == written
    with pytest.raises(ValueError, match="no row of quartet/demo has the metric 'bleu_seen'"):
        runs_table(seeds, ["bleu_seen"])
    with pytest.raises(ValueError, match="no rows of quartet/demo"):
        regenerate(page, rows=[])


def test_rows_that_are_means_already_become_a_line_per_method() -> None:
    ranged = dataclasses.replace(ROW, metric="vs_dense", value=0.5, low=-0.25, high=0.75)
    other = dataclasses.replace(ROW, provider="dense", value=30.0)
    elsewhere = dataclasses.replace(ROW, provider="cost", metric="seconds", commit="def")
    page = PAGE.replace("table: quartet/demo", "methods: quartet/demo columns: bleu vs_dense")
    written = regenerate(page, rows=[ROW, ranged, other, elsewhere])
    assert "| Method | bleu | vs_dense |" in written
    assert "| moe | 31.2 | 0.5 (-0.25 to 0.75) |" in written
    assert "| dense | 30.0 | - |" in written
    assert "cost" not in written
    assert "Measured on a CPU at abc.\n" in written
    assert regenerate(written, rows=[ROW, ranged, other, elsewhere]) == written
    with pytest.raises(ValueError, match="no row of quartet/demo has the metric 'chrf'"):
        methods_table([ROW], ["chrf"])


def test_a_marker_without_rows_is_an_error() -> None:
    with pytest.raises(ValueError, match="no rows of quartet/demo"):
        regenerate(PAGE, rows=[])


def test_check_fails_where_the_page_is_stale_and_changes_nothing(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    text = (REPOSITORY / "README.md").read_text()
    readme.write_text(text)
    command = [sys.executable, "-m", "scripts.tables", "--check", "--readme", str(readme)]
    assert subprocess.run(command, cwd=REPOSITORY, capture_output=True).returncode == 0
    stale = text.replace("| measured |", "| guessed |", 1)
    assert stale != text
    readme.write_text(stale)
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert run.returncode == 1
    assert "run python -m scripts.tables" in run.stderr
    assert readme.read_text() == stale
