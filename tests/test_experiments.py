"""Every experiment file composes, types and runs, shrunk by debug=smoke, so that none rots."""

from pathlib import Path

import pytest
import yaml

from configs.schema import load
from scripts.bench import bench
from scripts.testbed.launch import Run, Verb, compose, execute
from scripts.testbed.rows import REPOSITORY
from scripts.train import train
from scripts.tune import tune

FOLDER = REPOSITORY / "configs" / "experiment"
EXPERIMENTS = sorted(str(path.relative_to(FOLDER).with_suffix("")) for path in FOLDER.rglob("*.yaml"))
VERBS: dict[str, Verb] = {"train": train, "bench": bench, "tune": tune}


def content(name: str) -> dict[str, object]:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_it_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    verb = str(content(name)["experiment_verb"])
    config = load(compose(verb, [f"experiment={name}", "debug=smoke"]))
    result = execute(config, VERBS[verb], Run(folder=tmp_path, rank=0))
    assert result.rows
    assert (tmp_path / "rows.csv").is_file()
    page = (tmp_path / "report.html").read_text()
    assert name in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_it_says_how_it_is_run(name: str) -> None:
    assert content(name)["name"] == name
    first, second = (FOLDER / f"{name}.yaml").read_text().splitlines()[:2]
    assert first == "# @package _global_"
    assert second == f"# python -m scripts.{content(name)['experiment_verb']} experiment={name}"
