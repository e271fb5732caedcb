"""A function run as several ranks, each a fresh process here, on one core and, if wanted, on a host of its own.

The argument and the results are JSON files, so nothing is shared with the caller and nothing is unpickled.
"""

import contextlib
import ctypes
import datetime
import faulthandler
import importlib
import json
import math
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from scripts.testbed.files import write_text
from scripts.testbed.network import Host
from scripts.testbed.rows import REPOSITORY

LOG_LINES = 20
"""Last lines of a rank's log that an error shows."""
TIMEOUT_VARIABLE = "QUARTET_RANKS_TIMEOUT_S"
PR_SET_PDEATHSIG = 1


class RankError(RuntimeError):
    """A rank failed, or did not end in time.

    Attributes:
        rank: The rank that failed first, or the first of those that had not ended.
        exit_code: Its exit code, negative where a signal ended it; None where it was still running.
    """

    def __init__(self, message: str, *, rank: int, exit_code: int | None) -> None:
        super().__init__(message)
        self.rank = rank
        self.exit_code = exit_code


def run_ranks(
    function: str,
    argument: dict[str, object],
    *,
    num_ranks: int,
    folder: Path,
    hosts: Sequence[Host] = (),
    threads: int = 1,
    timeout_s: float,
    environment: Mapping[str, str] = {},
) -> list[dict[str, Any]]:
    """Run a function on several ranks and wait for all of them.

    Args:
        function: "package.module:name"; called as `name(rank, num_ranks, argument)` within a gloo process group (with
            one rank: within none), it returns a dictionary that JSON can hold.
        argument: What every rank gets; must fit into JSON.
        num_ranks: Number of ranks.
        folder: Where the argument, the results and `rank<i>.log` (what a rank printed) are written.
        hosts: Rank i runs on hosts[i]; where empty, all run in the caller's network and talk over loopback.
        threads: CPU threads of a rank; with 1, rank i is pinned to core i modulo the number of cores.
        timeout_s: Time after which ranks that have not ended are killed, in seconds; of their collectives, too.
        environment: Environment variables to add to the caller's.

    Returns:
        What the ranks returned, in the order of ranks.

    Raises:
        ValueError: Where an argument is out of its range.
        RankError: Where a rank fails or time is up; by then no rank is running.
    """
    _check(function, num_ranks, hosts, threads, timeout_s)
    folder = folder.resolve()
    write_text(folder / "argument.json", json.dumps(argument))
    shared = {
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": hosts[0].address if hosts else "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": str(threads),
        TIMEOUT_VARIABLE: str(timeout_s),
    }
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(num_ranks):
            host = hosts[rank] if hosts else None
            processes.append(_start(rank, host, function, folder, {**os.environ, **environment, **shared}))
        _wait(processes, folder, timeout_s)
    finally:
        _kill(processes)
    return [_result(rank, folder) for rank in range(num_ranks)]


def _check(function: str, num_ranks: int, hosts: Sequence[Host], threads: int, timeout_s: float) -> None:
    if not re.fullmatch(r"[\w.]+:\w+", function):
        raise ValueError(f'function: got {function!r}, accepts "package.module:name"')
    if num_ranks < 1:
        raise ValueError(f"num_ranks: got {num_ranks}, accepts 1 or more")
    if hosts and len(hosts) < num_ranks:
        raise ValueError(f"hosts: got {len(hosts)} for {num_ranks} ranks, accepts none or one for each rank")
    if threads < 1:
        raise ValueError(f"threads: got {threads}, accepts 1 or more")
    if not (math.isfinite(timeout_s) and timeout_s > 0):
        raise ValueError(f"timeout_s: got {timeout_s}, accepts a positive number of seconds")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _start(
    rank: int, host: Host | None, function: str, folder: Path, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    own = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GLOO_SOCKET_IFNAME": host.interface if host else "lo",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(REPOSITORY), environment.get("PYTHONPATH")))),
    }
    result = folder / f"rank{rank}.json"
    result.unlink(missing_ok=True)
    # -P: a folder named scripts where the caller stands is not ours.
    module = (sys.executable, "-P", "-m", "scripts.testbed.ranks")
    command = (*(host.prefix if host else ()), *module, function, str(folder / "argument.json"), str(result))
    with (folder / f"rank{rank}.log").open("wb") as log:
        return subprocess.Popen(
            command,
            env={**environment, **own},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait(processes: Sequence[subprocess.Popen[bytes]], folder: Path, timeout_s: float) -> None:
    """Return when all have ended well; the first that has not is the cause, those after it its consequences."""
    ended: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
    for rank, process in enumerate(processes):
        threading.Thread(target=_report_end, args=(rank, process.pid, ended), daemon=True).start()
    deadline = time.monotonic() + timeout_s
    running = set(range(len(processes)))
    while running:
        try:
            rank, code = ended.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            late = sorted(running)
            logs = "\n".join(_end_of_log(rank, folder) for rank in late)
            message = (
                f"rank {', '.join(map(str, late))} of {len(processes)} had not ended after {timeout_s:g} s\n{logs}"
            )
            raise RankError(message, rank=late[0], exit_code=None) from None
        running.discard(rank)
        if code != 0:
            what = f"ended with exit code {code}" if code > 0 else f"was ended by signal {-code} (exit code {code})"
            message = f"rank {rank} of {len(processes)} {what}\n{_end_of_log(rank, folder)}"
            raise RankError(message, rank=rank, exit_code=code)


def _report_end(rank: int, pid: int, ended: "queue.SimpleQueue[tuple[int, int]]") -> None:
    """Wait for a process without reaping it: until `_kill` has, its number names nobody else's group."""
    with contextlib.suppress(ChildProcessError):
        info = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        if info is not None:
            ended.put((rank, info.si_status if info.si_code == os.CLD_EXITED else -info.si_status))


def _kill(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End the ranks and everything they started."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    for process in processes:
        process.wait()


def _end_of_log(rank: int, folder: Path) -> str:
    path = folder / f"rank{rank}.log"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
    return "\n".join((f"last lines of {path}:", *lines)) if lines else f"{path} is empty"


def _result(rank: int, folder: Path) -> dict[str, Any]:
    path = folder / f"rank{rank}.json"
    if not path.exists():
        message = f"rank {rank} ended with exit code 0 and without a result\n{_end_of_log(rank, folder)}"
        raise RankError(message, rank=rank, exit_code=0)
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


def main(function: str, argument_file: str, result_file: str) -> None:
    """What one rank does.

    Args:
        function: "package.module:name".
        argument_file: JSON file to read the argument from.
        result_file: JSON file to write the result to.

    Raises:
        TypeError: Where the function returns anything but a dictionary that fits into JSON.
    """
    rank, num_ranks, threads = (int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS"))
    if threads == 1:
        _pin(rank)
    torch.set_num_threads(threads)
    module, _, name = function.partition(":")
    call = getattr(importlib.import_module(module), name)
    if num_ranks > 1:
        timeout = datetime.timedelta(seconds=float(os.environ[TIMEOUT_VARIABLE]))
        dist.init_process_group("gloo", timeout=timeout)
    result = call(rank, num_ranks, json.loads(Path(argument_file).read_text(encoding="utf-8")))
    if not isinstance(result, dict):
        raise TypeError(f"{function} returned a {type(result).__name__}, accepts a dictionary that fits into JSON")
    write_text(Path(result_file), json.dumps(result))
    if num_ranks > 1:
        dist.barrier()
        dist.destroy_process_group()
        leave()


def leave() -> NoReturn:
    """End a rank that is done, at once.

    Gloo's threads may still hold tensors that Python objects own; to free one while the interpreter goes down aborts
    the process, as a rank that failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _pin(rank: int) -> None:
    with contextlib.suppress(OSError, AttributeError):  # not allowed, or not Linux
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})


def _end_with_the_caller() -> None:
    """Have the kernel kill this process when the one that started it is killed."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    _end_with_the_caller()
    faulthandler.enable()
    try:
        main(*sys.argv[1:])
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # at once: a rank that lingers in its process group would be seen to fail after its peers
