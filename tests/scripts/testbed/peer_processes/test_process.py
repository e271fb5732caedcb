import os
import signal
import sys
from pathlib import Path

import pytest

from scripts.testbed.benchmarks.cpu_truth import Truth
from scripts.testbed.peer_processes import environments, process
from scripts.testbed.peer_processes.contest import WrongError, contest
from scripts.testbed.peer_processes.environments import PeerEnvironmentError, python_of
from scripts.testbed.peer_processes.problem import Array, Problem
from scripts.testbed.peer_processes.process import PeerError, PeerProcess
from scripts.testbed.peer_processes.roster import PEERS, Peer

CORES = sorted(os.sched_getaffinity(0))[:1]
CHAIN = Problem(kind="chain", batch=1, M=9, N=8, K=7, H=6)
ATTENTION = Problem(kind="attention", batch=2, M=9, N=9, K=8, H=8)


class Stub(Peer):
    """A worker that is a line of Python."""

    def python(self) -> Path:
        path = Path(self.environment["FOLDER"]) / "stub"
        path.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{self.environment['LINE']}'\n")
        path.chmod(0o700)
        return path


def stub(folder: Path, line: str) -> PeerProcess:
    peer = Stub(worker="none", environment={"FOLDER": str(folder), "LINE": line})
    return PeerProcess("stub", peer, cores=CORES, folder=folder)


def test_peers_are_checked_and_timed_in_turns(tmp_path: Path) -> None:
    processes = {
        name: PeerProcess(name, PEERS[name], cores=CORES, folder=tmp_path) for name in ("openblas", "torch_sdpa")
    }
    try:
        assert all(process.facts for process in processes.values())
        for problem, able, unable in ((CHAIN, "openblas", "torch_sdpa"), (ATTENTION, "torch_sdpa", "openblas")):
            found = contest(problem, processes, check=Truth(problem).check, rounds=3, clock="cpu", at_least_s=0.0)
            assert set(found.times) == {able}
            assert set(found.declined) == {unable}
            assert len(found.times[able].seconds) == 3
            assert found.times[able].speedup_over(found.times[able]) == 1
            assert found.times[able].flops == problem.flops
    finally:
        for each in processes.values():
            each.close()


def test_a_peer_that_is_wrong_is_left_out(tmp_path: Path) -> None:
    def check(name: str, computed: object) -> None:
        raise WrongError(f"{name} is off")

    peer = PeerProcess("openblas", PEERS["openblas"], cores=CORES, folder=tmp_path)
    try:
        found = contest(CHAIN, {"openblas": peer}, check=check, rounds=1, clock="cpu", at_least_s=0.0)
        assert found.declined == {"openblas": "openblas is off"}
        with pytest.raises(WrongError, match="fusion is off"):
            contest(CHAIN, {"fusion": peer}, check=check, rounds=1, clock="cpu", at_least_s=0.0)
    finally:
        peer.close()


def test_a_peer_that_fails_is_left_out_the_others_go_on_and_it_starts_anew(tmp_path: Path) -> None:
    peers = {name: PeerProcess(name, PEERS["openblas"], cores=CORES, folder=tmp_path) for name in ("openblas", "dying")}

    def check(name: str, computed: Array) -> None:
        Truth(CHAIN).check(name, computed)
        os.kill(peers["dying"].id, signal.SIGKILL)

    try:
        found = contest(CHAIN, peers, check=check, rounds=2, clock="cpu", at_least_s=0.0)
        assert set(found.times) == {"openblas"}
        assert len(found.times["openblas"].seconds) == 2
        assert "peer dying ended at" in found.declined["dying"]
        again = contest(CHAIN, peers, check=Truth(CHAIN).check, rounds=1, clock="cpu", at_least_s=0.0)
        assert set(again.times) == {"openblas", "dying"}
        with pytest.raises(PeerError, match="peer dying ended"):
            contest(CHAIN, {"fusion": peers["dying"]}, check=check, rounds=1, clock="cpu", at_least_s=0.0)
    finally:
        for each in peers.values():
            each.close()


def test_gradients_are_checked_too(tmp_path: Path) -> None:
    problem = Problem(kind="attention", batch=2, M=9, N=9, K=8, H=8, causal=True, backward=True)
    peer = PeerProcess("torch_eager", PEERS["torch_eager"], cores=CORES, folder=tmp_path)
    try:
        assert peer.load(problem) is None
        computed = peer.computed()
        truth = Truth(problem)
        truth.check("torch_eager", computed)
        computed[-1] += 1  # the last gradient
        with pytest.raises(WrongError, match=r"torch_eager is off by 1\.00e\+00 for attention 2,9,9,8,8"):
            truth.check("torch_eager", computed)
        with pytest.raises(WrongError, match="computes"):
            truth.check("torch_eager", computed[1:])
    finally:
        peer.close()


def test_an_error_shows_what_the_peer_printed(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match=r"peer stub ended at 'facts', exit code 7\n.*why") as caught:
        stub(tmp_path, 'import sys; print("why", file=sys.stderr); sys.exit(7)')
    assert "why" in str(caught.value)


def test_a_peer_that_does_not_answer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "START_TIMEOUT_S", 0.2)
    with pytest.raises(PeerError, match=r"peer stub has not answered 'facts' for 0\.2 s"):
        stub(tmp_path, "import sys; sys.stdin.read()")


def test_what_is_no_answer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="peer stub"):
        stub(tmp_path, 'print("hello", flush=True)')


def test_an_environment_that_cannot_be_made_says_how_to_do_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(environments.sys, "executable", "/bin/false")
    with pytest.raises(
        PeerEnvironmentError, match=r"the peer jax cannot be installed: /bin/false(.|\n)*bench\.cpu\.peers"
    ):
        python_of("jax")
