"""A peer's process as the benchmark sees it: questions with a limit on how long an answer may take."""

import json
import os
import selectors
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from scripts.testbed.files import cache_folder
from scripts.testbed.peer_processes.network import Network
from scripts.testbed.peer_processes.problem import Array, Problem
from scripts.testbed.peer_processes.roster import Peer
from scripts.testbed.rows import REPOSITORY

START_TIMEOUT_S = 120.0
LOAD_TIMEOUT_S = 1200.0  # compilers among them search
CALL_TIMEOUT_S = 120.0
LOG_LINES = 15  # of what a peer printed, that an error shows


class PeerError(RuntimeError):
    """A peer failed, ended, or did not answer in time; the message says which, at what, and what it printed last."""


class PeerProcess:
    """A worker on its own cores, started with the object and ended by `close`."""

    def __init__(self, name: str, peer: Peer, *, cores: Sequence[int], folder: Path) -> None:
        """Start the worker.

        Args:
            name: What errors call it.
            peer: What to start.
            cores: Where it may run; it gets as many threads.
            folder: Where its log and what it computes are written.

        Raises:
            PeerEnvironmentError: If its packages cannot be installed.
            PeerError: If it does not start.
        """
        self.name, self.computes = name, peer.computes
        self.how, self.planned_s = "", None
        self._peer, self._cores, self._folder = peer, cores, folder.resolve()
        self._log = self._folder / f"{name}.log"
        self._start()

    def _start(self) -> None:
        peer, threads = self._peer, len(self._cores)
        counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
        compiler = {"TORCHINDUCTOR_CACHE_DIR": str(cache_folder() / "inductor"), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        own = {**_plain_environment(), **counts, **compiler, "PYTHONPATH": str(REPOSITORY), **peer.environment}
        command = [str(peer.python()), "-m", f"{__package__}.workers.{peer.worker}", *peer.arguments, str(threads)]
        self._folder.mkdir(parents=True, exist_ok=True)
        own_cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, self._cores)  # which a process inherits, before a library counts them
        try:
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    command, cwd=self._folder, env=own, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
                )
        finally:
            os.sched_setaffinity(0, own_cores)
        try:
            self.facts: dict[str, str] = self._ask({"do": "facts"}, START_TIMEOUT_S)["facts"]
        except BaseException:
            self.close()
            raise

    @property
    def id(self) -> int:
        """The system's number of the process."""
        return self._process.pid

    def load(self, problem: Problem | Network) -> str | None:
        """Make a problem ready, by a new process if the last problem was too much for the old one.

        Args:
            problem: What to compute.

        Returns:
            None, or why the library cannot compute it.

        Raises:
            PeerError: If it fails.
        """
        if self._process.poll() is not None:
            self.close()
            self._start()
        answer = self._ask({"do": "load", "problem": problem.to_json()}, LOAD_TIMEOUT_S, f"load {problem}")
        self.how, self.planned_s = str(answer.get("how", "")), answer.get("planned_s")
        return answer.get("declined")

    def computed(self) -> Array:
        """What the peer computes for the problem that is loaded: E and the gradients, all in one row."""
        path = self._folder / f"{self.name}.npy"
        self._ask({"do": "check", "path": str(path)}, CALL_TIMEOUT_S)
        try:
            return np.load(path, allow_pickle=False)
        finally:
            path.unlink(missing_ok=True)

    def seconds(self, *, clock: str, at_least: float) -> tuple[float, float | None]:
        """Time calls.

        Args:
            clock: `cpu`, the time of all the process's threads, or `wall`.
            at_least: Seconds over which short calls are repeated.

        Returns:
            Seconds of a call, and its floating-point operations if they are not the problem's.
        """
        answer = self._ask({"do": "time", "clock": clock, "seconds": at_least}, CALL_TIMEOUT_S)
        return answer["seconds"], answer["flops"]

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # of a question that a process which ended never read
                    pipe.close()

    def _ask(self, question: Mapping[str, Any], timeout_s: float, what: str = "") -> dict[str, Any]:
        what = what or str(question["do"])
        try:
            _pipe(self._process.stdin).write(json.dumps(question).encode() + b"\n")
            _pipe(self._process.stdin).flush()
            answer = json.loads(self._line(timeout_s, what))
        except (BrokenPipeError, ValueError) as error:
            raise self._error(f"ended at {what!r} ({error})") from error
        if "error" in answer:
            raise self._error(f"failed at {what!r}: {answer['error']}")
        return dict(answer)

    def _line(self, timeout_s: float, what: str) -> bytes:
        pipe, found, deadline = _pipe(self._process.stdout), b"", time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while not found.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise self._error(f"has not answered {what!r} for {timeout_s:g} s")
                part = os.read(pipe.fileno(), 1 << 16)
                if not part:
                    raise self._error(f"ended at {what!r}, exit code {self._process.wait(CALL_TIMEOUT_S)}")
                found += part
        return found

    def _error(self, text: str) -> PeerError:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
        return PeerError(f"peer {self.name} {text}\n" + "\n".join(lines))


def _plain_environment() -> dict[str, str]:
    """The caller's environment without what steers a library: each peer says itself what it wants."""
    steering = ("OMP_", "KMP_", "MKL_", "OPENBLAS_", "GOMP_", "MALLOC_", "TORCHINDUCTOR_", "XLA_", "ONEDNN_")
    return {name: value for name, value in os.environ.items() if not name.startswith(steering)}


def _pipe(pipe: Any) -> BinaryIO:
    assert pipe is not None
    return pipe
