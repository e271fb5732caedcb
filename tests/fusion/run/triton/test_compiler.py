"""The compiling process keeps to its protocol whatever it is sent: one answer a line, and nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fusion.run.triton import resources

PROGRAM = Path(resources.__file__).with_name("compiler.py")
COPY = """
import triton
import triton.language as tl

print("a module may print")

@triton.jit
def copy(x, y, n, B: tl.constexpr):
    index = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + index, tl.load(x + index, mask=index < n), mask=index < n)
"""


def ask(requests: list[dict[str, object]], folder: Path, **environment: str) -> list[dict[str, object]]:
    """The process's lines for some requests; the first one says that it is ready."""
    settings = {"TRITON_ALWAYS_COMPILE": "1", "TRITON_DUMP_PTXAS_LOG": "1", "TRITON_CACHE_DIR": str(folder / "cache")}
    run = subprocess.run(
        [sys.executable, "-P", str(PROGRAM)],
        input="".join(json.dumps(request) + "\n" for request in requests),
        env={**os.environ, "TRITON_INTERPRET": "0", **settings, **environment},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.fixture
def request_copy(tmp_path: Path) -> dict[str, object]:
    path = tmp_path / "copy_kernel.py"
    path.write_text(COPY, encoding="utf-8")
    return {
        "path": str(path), "name": "copy", "target": ["cuda", 80, 32], "options": {"num_warps": 2},
        "signature": {"x": "*fp32", "y": "*fp32", "n": "i32", "B": "constexpr"}, "constants": {"B": 256},
        "attributes": {},
    }  # fmt: skip


def test_every_request_gets_one_answer_with_the_figures_of_its_target(
    tmp_path: Path, request_copy: dict[str, object]
) -> None:
    targets = [["cuda", 80, 32], ["cuda", 86, 32], ["cuda", 90, 32], ["hip", "gfx942", 64]]
    ready, *answers = ask([{**request_copy, "target": target} for target in targets], tmp_path)
    assert "triton" in ready
    assert len(answers) == len(targets)
    for answer in answers:
        assert set(answer) == {"shared_bytes", "registers", "spilled_bytes", "num_warps", "seconds"}
        assert (answer["shared_bytes"], answer["spilled_bytes"], answer["num_warps"]) == (0, 0, 2)
        assert 1 <= answer["registers"] <= 64  # type: ignore[operator]


def test_a_kernel_that_does_not_compile_is_an_answer_and_not_the_end(
    tmp_path: Path, request_copy: dict[str, object]
) -> None:
    missing = {**request_copy, "name": "move"}
    wrong = {**request_copy, "constants": {"B": 250}}
    _, first, second, third = ask([missing, wrong, request_copy], tmp_path)
    assert "move" in first["error"]  # type: ignore[operator]
    assert "power of 2" in second["error"]  # type: ignore[operator]
    assert third["shared_bytes"] == 0


def test_a_triton_that_reports_nothing_is_told_from_a_bad_kernel(
    tmp_path: Path, request_copy: dict[str, object]
) -> None:
    _, answer = ask([request_copy], tmp_path, TRITON_DUMP_PTXAS_LOG="0")
    assert list(answer) == ["unusable"]
    assert "registers" in answer["unusable"]  # type: ignore[operator]
