"""Every experiment file composes, types and runs, shrunk by debug=smoke, so that none rots."""

import json
import os
import subprocess
import sys
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
    folder = tmp_path
    if config.cluster.num_ranks > 1:
        folder = on_ranks(verb, name, config.cluster.num_ranks, tmp_path)
    else:
        assert execute(config, VERBS[verb], Run(folder=folder, rank=0)).rows
    assert (folder / "rows.csv").is_file()
    page = (folder / "report.html").read_text()
    assert name in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page


def on_ranks(verb: str, name: str, num_ranks: int, folder: Path) -> Path:
    """Run an experiment that is made for several ranks as its file says, by torchrun; the folder it wrote to."""
    launcher = ["torch.distributed.run", "--nproc-per-node", str(num_ranks), "--rdzv-backend", "c10d"]
    run = subprocess.run(
        [sys.executable, "-m", *launcher, "--rdzv-endpoint", "localhost:0", "-m", f"scripts.{verb}",
         f"experiment={name}", "debug=smoke"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert json.loads(run.stdout.splitlines()[-1])["rows"]
    (written,) = folder.glob("outputs/*/*")
    return written


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_it_says_how_it_is_run(name: str) -> None:
    assert content(name)["name"] == name
    first, second = (FOLDER / f"{name}.yaml").read_text().splitlines()[:2]
    assert first == "# @package _global_"
    assert second == f"# python -m scripts.{content(name)['experiment_verb']} experiment={name}"
