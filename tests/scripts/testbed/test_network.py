"""Networks are taken down whatever happens, and their links carry what they are said to."""

import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scripts.testbed import network
from scripts.testbed.network import Host, NetworkError, set_rate, shaped_hosts, unavailable
from scripts.testbed.rows import REPOSITORY

REASON = unavailable()
netns = [
    pytest.mark.netns,
    pytest.mark.skipif(REASON is not None, reason=f"no network namespaces here: {REASON}"),
]

HOLDER = """
import os, subprocess, sys, time
from scripts.testbed.network import shaped_hosts
with shaped_hosts(1, rate_mbit=100.0) as (host,):
    inside = subprocess.Popen([*host.prefix, "sleep", "600"], stdout=subprocess.DEVNULL)
    print(host.namespace, inside.pid, flush=True)
    inside.wait()
"""
RECEIVER = """
import socket, sys
with socket.create_server((sys.argv[1], 0)) as server:
    print(server.getsockname()[1], flush=True)
    connection, _ = server.accept()
    missing = int(sys.argv[2])
    while missing:
        missing -= len(connection.recv(min(missing, 1 << 20)))
    connection.sendall(b"x")
"""
SENDER = """
import socket, sys, time
with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as connection:
    start = time.perf_counter()
    connection.sendall(bytes(int(sys.argv[3])))
    assert connection.recv(1) == b"x"
    print(time.perf_counter() - start)
"""


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """A job that a shell starts in the background ignores Ctrl-C, and so would what it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def own_namespaces(pid: int | None = None) -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.split()
    return [name for name in listed if name.startswith(f"quartet-{pid or os.getpid()}-")]


def is_running(pid: int) -> bool:
    return network._started(pid) is not None


def start_holder() -> tuple["subprocess.Popen[str]", str, int]:
    """A process that holds a network with another process inside it; the namespace and the inner process."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert holder.stdout is not None
    namespace, pid = holder.stdout.readline().split()
    assert own_namespaces(holder.pid)
    return holder, namespace, int(pid)


class TestWithoutNamespaces:
    @pytest.mark.parametrize("num_hosts", [0, -1, 255])
    def test_refuses_a_number_of_hosts(self, num_hosts: int) -> None:
        with pytest.raises(ValueError, match=f"num_hosts: got {num_hosts}"), shaped_hosts(num_hosts, rate_mbit=1.0):
            pass

    @pytest.mark.parametrize("rate_mbit", [0.0, -1.0, float("nan"), float("inf")])
    def test_refuses_a_rate(self, rate_mbit: float) -> None:
        with pytest.raises(ValueError, match="rate_mbit: got"), shaped_hosts(1, rate_mbit=rate_mbit):
            pass

    @pytest.mark.parametrize("rate_mbit", [-1.0, math.inf, math.nan])
    def test_refuses_to_change_to_a_rate(self, rate_mbit: float) -> None:
        with pytest.raises(ValueError, match="rate_mbit: got"):
            set_rate((), rate_mbit)

    def test_says_what_is_missing_and_what_to_do(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        assert unavailable() == "this is not root"
        with pytest.raises(NetworkError, match=r"not root; run as root .* loopback"), shaped_hosts(1, rate_mbit=1.0):
            pass
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        monkeypatch.setenv("PATH", "")
        assert unavailable() == "not installed: ip, tc"
        with pytest.raises(NetworkError, match="apt-get install iproute2"), shaped_hosts(1, rate_mbit=1.0):
            pass

    def test_a_refusal_is_a_reason(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(sys, "platform", "linux")
        for tool in ("ip", "tc"):
            (tmp_path / tool).write_text("#!/bin/sh\necho Operation not permitted >&2; exit 2\n")
            (tmp_path / tool).chmod(0o755)
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        assert re.fullmatch(r"refused: ip netns add quartet-\S+: Operation not permitted", unavailable() or "")


class TestNetworks:
    pytestmark = netns

    def test_hosts_reach_each_other_and_themselves(self) -> None:
        with shaped_hosts(3, rate_mbit=1000.0) as hosts:
            assert len(own_namespaces()) == 4
            assert len({host.address for host in hosts}) == 3
            transfer_seconds(hosts[2], hosts[0], 1000)
            transfer_seconds(hosts[1], hosts[1], 1000)
        assert own_namespaces() == []

    def test_networks_coexist(self) -> None:
        with shaped_hosts(1, rate_mbit=10.0) as first, shaped_hosts(1, rate_mbit=10.0) as second:
            assert first[0].namespace != second[0].namespace
            assert len(own_namespaces()) == 4
        assert own_namespaces() == []

    def test_a_link_lets_through_what_its_rate_allows(self) -> None:
        num_bytes, rate_mbit = 4 * 2**20, 200.0
        with shaped_hosts(2, rate_mbit=rate_mbit) as (sender, receiver):
            seconds = transfer_seconds(sender, receiver, num_bytes)
        assert 8 * num_bytes / seconds < 1.3 * rate_mbit * 1e6

    def test_a_rate_changes_under_way_at_both_ends_of_every_link(self) -> None:
        with shaped_hosts(2, rate_mbit=100) as hosts:
            for rate_mbit, expected in ((40.0, "tbf .* rate 40Mbit"), (0.0, "pfifo"), (7.0, "tbf .* rate 7Mbit")):
                set_rate(hosts, rate_mbit)
                switch = hosts[0].namespace.rpartition("-")[0] + "-sw"
                for namespace, interface in ((hosts[1].namespace, "link0"), (switch, "port1")):
                    shown = subprocess.run(
                        ["tc", "-n", namespace, "qdisc", "show", "dev", interface],
                        capture_output=True, text=True, check=True,
                    ).stdout  # fmt: skip
                    assert re.search(expected, shown), shown

    def test_is_taken_down_after_an_exception_with_what_runs_inside(self) -> None:
        with pytest.raises(ZeroDivisionError), shaped_hosts(2, rate_mbit=10.0) as hosts:  # noqa: PT012
            inside = subprocess.Popen([*hosts[1].prefix, "sleep", "600"], start_new_session=True)
            wait_until(lambda: "sleep" in Path(f"/proc/{inside.pid}/cmdline").read_text().split("\0")[0])
            raise ZeroDivisionError
        assert inside.wait() == -signal.SIGKILL
        assert own_namespaces() == []

    def test_is_taken_down_after_a_failure_half_way(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(network, "unavailable", lambda: None)
        shape, seen = network._shape, []

        def fail_at_the_second_host(namespace: str, interface: str, rate_mbit: float) -> None:
            if namespace.endswith("-h1"):
                seen.extend(own_namespaces())
                raise NetworkError("no more")
            shape(namespace, interface, rate_mbit)

        monkeypatch.setattr(network, "_shape", fail_at_the_second_host)
        with pytest.raises(NetworkError, match="no more"), shaped_hosts(3, rate_mbit=10.0):
            pass
        assert len(seen) == 3
        assert own_namespaces() == []

    def test_sigterm_raises_inside_and_the_handler_comes_back(self) -> None:
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit) as caught, shaped_hosts(1, rate_mbit=10.0):
            signal.raise_signal(signal.SIGTERM)
        assert caught.value.code == 128 + signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is before
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert own_namespaces() == []

    @pytest.mark.parametrize(
        ("number", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)], ids=["TERM", "INT"]
    )
    def test_a_signal_while_it_is_taken_down_comes_after(
        self, number: signal.Signals, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(network, "unavailable", lambda: None)
        take_down = network._take_down

        def interrupted(name: str) -> None:
            signal.raise_signal(number)
            take_down(name)

        monkeypatch.setattr(network, "_take_down", interrupted)
        with pytest.raises(error), shaped_hosts(1, rate_mbit=10.0):
            pass
        assert own_namespaces() == []

    def test_works_outside_the_main_thread(self) -> None:
        seen: list[int] = []

        def hold() -> None:
            with shaped_hosts(1, rate_mbit=10.0):
                seen.append(len(own_namespaces()))

        thread = threading.Thread(target=hold)
        thread.start()
        thread.join()
        assert seen == [2]
        assert own_namespaces() == []

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)])
    def test_a_signal_from_outside_takes_it_down(self, number: signal.Signals, code: int) -> None:
        holder, _, inside = start_holder()
        holder.send_signal(number)
        holder.communicate()
        assert holder.returncode == code
        assert own_namespaces(holder.pid) == []
        assert not is_running(inside)

    def test_what_a_killed_process_left_is_removed_by_the_next_and_nothing_else(self) -> None:
        killed, namespace, orphan = start_holder()
        alive, other_namespace, other_inside = start_holder()
        try:
            killed.kill()
            killed.wait()
            assert namespace in own_namespaces(killed.pid)
            assert is_running(orphan)
            with shaped_hosts(1, rate_mbit=10.0):
                assert own_namespaces(killed.pid) == []
                assert not is_running(orphan)
                assert other_namespace in own_namespaces(alive.pid)
                assert is_running(other_inside)
        finally:
            alive.terminate()
            alive.communicate()
            killed.communicate()

    def test_a_process_that_took_a_dead_ones_number_owns_nothing(self) -> None:
        stale = f"quartet-{os.getpid()}-1-0-h0"
        subprocess.run(["ip", "netns", "add", stale], check=True)
        with shaped_hosts(1, rate_mbit=10.0):
            assert stale not in own_namespaces()


def transfer_seconds(sender: Host, receiver: Host, num_bytes: int) -> float:
    """Time to send bytes over TCP from one host to another, their arrival confirmed."""
    listening = subprocess.Popen(
        [*receiver.prefix, sys.executable, "-c", RECEIVER, receiver.address, str(num_bytes)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert listening.stdout is not None
    port = listening.stdout.readline().strip()
    sent = subprocess.run(
        [*sender.prefix, sys.executable, "-c", SENDER, receiver.address, port, str(num_bytes)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    listening.communicate()
    assert sent.returncode == 0, sent.stderr
    return float(sent.stdout)


def wait_until(condition: Callable[[], bool], patience_s: float = 10.0) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
