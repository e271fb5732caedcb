"""What the README shows is run: its examples, its files and its commands' experiments."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.testbed.rows import REPOSITORY

TEXT = (REPOSITORY / "README.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"<!-- example: (\w+) -->\n```python\n(.*?)```", TEXT, re.DOTALL))

ON_RANKS = re.findall(r"<!-- example on (\d+) ranks: \w+ -->\n```python\n(.*?)```", TEXT, re.DOTALL)


def test_every_package_has_an_example() -> None:
    assert set(EXAMPLES) >= {"moe_pipeline", "fusion", "omoe", "bliss"}


@pytest.mark.parametrize("package", EXAMPLES)
def test_the_example_runs_as_it_stands(package: str) -> None:
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}  # what measures kernels does not wait for a core that others have
    run = subprocess.run(
        [sys.executable, "-c", EXAMPLES[package]], cwd=REPOSITORY, capture_output=True, text=True, env=alone
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(("num_ranks", "example"), ON_RANKS)
def test_the_example_runs_on_ranks(num_ranks: str, example: str, tmp_path: Path) -> None:
    file = tmp_path / "example.py"
    file.write_text(example, encoding="utf-8")
    launcher = ["torch.distributed.run", "--nproc-per-node", num_ranks, "--rdzv-backend", "c10d"]
    run = subprocess.run(
        [sys.executable, "-m", *launcher, "--rdzv-endpoint", "localhost:0", str(file)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("PipelineConfig(num_chunks=") == int(num_ranks)


def test_what_it_names_exists() -> None:
    paths = re.findall(
        r"[`(]((?:moe_pipeline|fusion|omoe|bliss|configs|scripts|tests)/[\w./-]*\w(?:/|\.\w+)?)[`)]", TEXT
    )
    assert paths
    missing = [path for path in paths if not (REPOSITORY / path).exists()]
    assert not missing


def test_experiments_of_its_commands_exist() -> None:
    names = set(re.findall(r"experiment=([\w/]+\w)", TEXT))
    assert names
    for name in names:
        assert (REPOSITORY / "configs" / "experiment" / f"{name}.yaml").is_file(), name
