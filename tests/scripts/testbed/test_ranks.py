"""A function on several ranks: results in order, on its core and its host, and every failure brought back."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from scripts.testbed import ranks
from scripts.testbed.network import shaped_hosts, unavailable
from scripts.testbed.ranks import RankError, run_ranks
from scripts.testbed.rows import REPOSITORY

REASON = unavailable()
HERE = "tests.scripts.testbed.test_ranks"


def describe(rank: int, num_ranks: int, argument: dict[str, Any]) -> dict[str, Any]:
    """What a rank sees of its world."""
    total = torch.tensor([rank + 1])
    if dist.is_initialized():
        dist.all_reduce(total)
    return {
        "rank": rank,
        "num_ranks": num_ranks,
        "argument": argument,
        "total": total.item(),
        "group": dist.is_initialized(),
        "threads": torch.get_num_threads(),
        "cores": sorted(os.sched_getaffinity(0)),
        "network": os.stat("/proc/self/ns/net").st_ino,
        "extra": os.environ.get("EXTRA"),
    }


def fail(rank: int, num_ranks: int, argument: dict[str, Any]) -> dict[str, Any]:
    """The first rank fails while the other, which has started a process of its own, waits for it."""
    if rank == 1:
        child = subprocess.Popen(["sleep", "600"])
        Path(argument["pids"]).write_text(json.dumps([os.getpid(), child.pid]))
    dist.barrier()
    if rank == 0:
        print("printed before it failed")
        raise ValueError("this rank has had enough")
    dist.barrier()
    return {}


def hold(rank: int, num_ranks: int, argument: dict[str, Any]) -> dict[str, Any]:
    """Tell its number, and stay."""
    Path(argument["pid"]).write_text(str(os.getpid()))
    signal.pause()
    return {}


def leave(rank: int, num_ranks: int, argument: dict[str, Any]) -> dict[str, Any]:
    """End in a way that no Python code sees."""
    if "signal" in argument:
        signal.raise_signal(signal.Signals(argument["signal"]))
    os._exit(argument["code"])


def give(rank: int, num_ranks: int, argument: dict[str, Any]) -> Any:
    """Return what is no dictionary."""
    return [1]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], patience_s: float = 60.0) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_results_come_in_order_from_pinned_ranks(tmp_path: Path) -> None:
    argument: dict[str, object] = {"x": [1, None, "ü"]}
    cores = sorted(os.sched_getaffinity(0))
    results = run_ranks(
        f"{HERE}:describe",
        argument,
        num_ranks=2,
        folder=tmp_path / "new",
        timeout_s=60,
        environment={"EXTRA": "given", "RANK": "7"},
    )
    assert [result["rank"] for result in results] == [0, 1]
    for rank, result in enumerate(results):
        expected = {"num_ranks": 2, "argument": argument, "total": 3, "group": True, "threads": 1, "extra": "given"}
        assert expected.items() <= result.items()
        assert result["cores"] == [cores[rank % len(cores)]]
        assert (tmp_path / "new" / f"rank{rank}.log").exists()


def test_one_rank_has_no_group_and_several_threads_no_pin(tmp_path: Path) -> None:
    (result,) = run_ranks(f"{HERE}:describe", {}, num_ranks=1, folder=tmp_path, threads=2, timeout_s=60)
    assert result["group"] is False
    assert result["threads"] == 2
    assert result["cores"] == sorted(os.sched_getaffinity(0))


@pytest.mark.netns
@pytest.mark.skipif(REASON is not None, reason=f"no network namespaces here: {REASON}")
def test_ranks_run_on_their_hosts(tmp_path: Path) -> None:
    with shaped_hosts(2, rate_mbit=500.0) as hosts:
        results = run_ranks(f"{HERE}:describe", {}, num_ranks=2, folder=tmp_path, hosts=hosts, timeout_s=60)
    assert [result["total"] for result in results] == [3, 3]
    assert len({os.stat("/proc/self/ns/net").st_ino, *(result["network"] for result in results)}) == 3


def test_a_failing_rank_is_named_with_its_log_and_the_others_are_ended(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    with pytest.raises(RankError) as caught:
        run_ranks(f"{HERE}:fail", {"pids": str(pids)}, num_ranks=2, folder=tmp_path, timeout_s=60)
    assert (caught.value.rank, caught.value.exit_code) == (0, 1)
    text = str(caught.value)
    assert "rank 0 of 2 ended with exit code 1" in text
    assert "ValueError: this rank has had enough" in text
    assert "printed before it failed" in text
    assert str(tmp_path / "rank0.log") in text
    other, started = json.loads(pids.read_text())
    assert not is_running(other)
    wait_until(lambda: not is_running(started))  # killed, and reaped by init alone


def test_ranks_that_do_not_end_in_time_are_named_and_ended(tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"rank 0, 1 of 2 had not ended after 0.5 s") as caught:
        run_ranks(f"{HERE}:hold", {"pid": str(tmp_path / "pid")}, num_ranks=2, folder=tmp_path, timeout_s=0.5)
    assert (caught.value.rank, caught.value.exit_code) == (0, None)
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not any(str(tmp_path).encode() in command for command in commands)


@pytest.mark.parametrize(
    ("argument", "exit_code", "text"),
    [
        ({"code": 0}, 0, "without a result"),
        ({"signal": int(signal.SIGKILL)}, -9, "ended by signal 9"),
    ],
    ids=["no result", "signal"],
)
def test_a_rank_that_just_ends_is_named(argument: dict[str, object], exit_code: int, text: str, tmp_path: Path) -> None:
    (tmp_path / "rank0.json").write_text('{"from": "an earlier run"}')
    with pytest.raises(RankError, match=text) as caught:
        run_ranks(f"{HERE}:leave", argument, num_ranks=1, folder=tmp_path, timeout_s=60)
    assert caught.value.exit_code == exit_code


def test_a_result_must_be_a_dictionary(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="returned a list, accepts a dictionary"):
        run_ranks(f"{HERE}:give", {}, num_ranks=1, folder=tmp_path, timeout_s=60)


def test_a_rank_does_not_outlive_a_killed_caller(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = f"""
from pathlib import Path
from scripts.testbed.ranks import run_ranks
run_ranks("{HERE}:hold", {{"pid": {str(pid)!r}}}, num_ranks=1, folder=Path({str(tmp_path)!r}), timeout_s=60)
"""
    caller = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    try:
        wait_until(lambda: pid.exists() and pid.read_text() != "")
        assert is_running(int(pid.read_text()))
    finally:
        caller.kill()
        caller.wait()
    wait_until(lambda: not is_running(int(pid.read_text())))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"function": "module.name"}, r'function: got .* accepts "package.module:name"'),
        ({"num_ranks": 0}, "num_ranks: got 0"),
        ({"threads": 0}, "threads: got 0"),
        ({"timeout_s": 0.0}, "timeout_s: got 0.0"),
        ({"timeout_s": math.inf}, "timeout_s: got inf"),
        ({"hosts": [ranks.Host(namespace="n", interface="i", address="a")]}, "hosts: got 1 for 2 ranks"),
    ],
)
def test_refuses_what_it_cannot_run(changes: dict[str, Any], text: str, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"function": f"{HERE}:describe", "num_ranks": 2, "timeout_s": 1.0, **changes}
    with pytest.raises(ValueError, match=text):
        run_ranks(argument={}, folder=tmp_path / "none", **arguments)
    assert not (tmp_path / "none").exists()
