"""What the README shows is run: its examples, its files and its commands' experiments."""

import re
import subprocess
import sys

import pytest

from scripts.testbed.rows import REPOSITORY

TEXT = (REPOSITORY / "README.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"<!-- example: (\w+) -->\n```python\n(.*?)```", TEXT, re.DOTALL))


def test_every_package_has_an_example() -> None:
    assert set(EXAMPLES) == {"moe_pipeline", "fusion", "omoe", "bliss"}


@pytest.mark.parametrize("package", EXAMPLES)
def test_the_example_runs_as_it_stands(package: str) -> None:
    run = subprocess.run([sys.executable, "-c", EXAMPLES[package]], cwd=REPOSITORY, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


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
