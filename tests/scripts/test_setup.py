"""Each way a virtual environment can fail to be made ends in one line that says what to do."""

import subprocess
import sys
from pathlib import Path

import pytest

from scripts.testbed.rows import REPOSITORY

SCRIPT = (REPOSITORY / "scripts" / "setup.py").read_text(encoding="utf-8")


def checkout(folder: Path) -> Path:
    (folder / "scripts").mkdir()
    (folder / "scripts" / "setup.py").write_text(SCRIPT)
    (folder / "pyproject.toml").write_text("")
    (folder / "constraints.txt").write_text("torch==0\n")
    return folder


def run(folder: Path, before: str = "") -> subprocess.CompletedProcess[str]:
    """Run the script as its own file would run, after some lines that change what it meets."""
    path = folder / "scripts" / "setup.py"
    code = f"{before}\nimport runpy\nrunpy.run_path({str(path)!r}, run_name='__main__')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("before", "message"),
    [
        ("import sys; sys.version_info = (3, 8, 1)", "Python 3.11 or newer is needed and"),
        ("import sys; sys.modules['ensurepip'] = None", "has no venv module; install it (Debian: apt-get install"),
    ],
    ids=["old Python", "Python without venv"],
)
def test_a_python_that_will_not_do(before: str, message: str, tmp_path: Path) -> None:
    result = run(checkout(tmp_path), before)
    assert result.returncode == 1
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize("remains", [[], ["pyvenv.cfg"], ["pyvenv.cfg", "bin/python"]], ids=len)
def test_a_half_made_environment(remains: list[str], tmp_path: Path) -> None:
    folder = checkout(tmp_path)
    (folder / ".venv" / "bin").mkdir(parents=True)
    for name in remains:
        path = folder / ".venv" / name
        path.write_text("#!/bin/sh\nexit 1\n")
        path.chmod(0o755)
    result = run(folder)
    assert result.returncode == 1
    assert result.stderr == "error: .venv is half-made or its Python is gone; run: make clean, then this again\n"


def test_old_pythons_can_read_the_script() -> None:
    compile(SCRIPT, "setup.py", "exec", flags=0, dont_inherit=True, optimize=0)
    import ast

    ast.parse(SCRIPT, feature_version=(3, 7))
    assert 'f"' not in SCRIPT
