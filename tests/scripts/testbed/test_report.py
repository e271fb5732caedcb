from pathlib import Path

from configs.schema import load
from scripts.testbed.launch import Outcome, Run, compose, execute
from scripts.testbed.report import Section, Table, figure
from scripts.testbed.rows import Row

CONFIG = load(compose("train", ["experiment=quartet/demo", "debug=smoke"]))


def test_text_from_data_is_escaped_and_pictures_are_inside(tmp_path: Path) -> None:
    table = Table(headers=("Source", "Output"), rows=(("<script>alert(1)</script>", "a & b"),))
    outcome = Outcome(
        rows=(Row(provider="moe", metric="bleu", unit="sacreBLEU", value=12.345),),
        summary={"bleu": 12.345, "missing": None},
        sections=(Section(title="Examples", note="ten", table=table, plots=("<svg>plot</svg>",)),),
    )
    execute(CONFIG, lambda config, run: outcome, Run(folder=tmp_path, rank=0))
    page = (tmp_path / "report.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "<svg>plot</svg>" in page
    assert "these figures mean nothing" in page
    assert "12.3" in page
    assert "missing" not in page


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    outcome = Outcome(rows=(), summary={})
    execute(CONFIG, lambda config, run: outcome, Run(folder=tmp_path, rank=1))
    assert list(tmp_path.iterdir()) == []


def test_figures_have_the_digits_they_deserve() -> None:
    assert [figure(value) for value in (0.12345, 3.14159, 31.4159, 3141.59, 7, "x")] == [
        "0.123", "3.14", "31.4", "3,142", "7", "x",
    ]  # fmt: skip
