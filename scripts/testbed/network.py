"""Hosts joined by real links of a chosen rate, all on this machine: network namespaces, a bridge and token buckets.

Every host is a network namespace whose one interface is wired to a switch, a bridge in a namespace of its own; both
ends of the wire let through what the rate allows (the tbf queue). What is sent therefore takes the time a slow network
takes and no more compute than a fast one. Messages below the bucket of 256 KiB may pass faster than the rate.

A namespace is named `quartet-<pid>-<start of that process>-<count>-<part>`, so that several runs can coexist and what a
killed run left behind is known to belong to nobody.
"""

import contextlib
import itertools
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType

logger = logging.getLogger(__name__)

MAX_HOSTS = 254
"""Addresses there are in the network of the hosts, 10.77.0.0/24."""
SHAPE = ("burst", "256kb", "latency", "20ms")
FIX = (
    "run as root on Linux with iproute2 (apt-get install iproute2), in a container with --privileged; "
    "or do without shaped links: leave out the hosts, and ranks talk over loopback"
)
OURS = re.compile(r"quartet-(?P<pid>\d+)-(?P<started>\d+)-\d+-\w+")
_numbers = itertools.count()


class NetworkError(RuntimeError):
    """A network could not be made: the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Host:
    """One host of a network."""

    namespace: str
    """Name of its network namespace."""
    interface: str
    """Name of its one interface to the others."""
    address: str
    """Its IPv4 address."""

    @property
    def prefix(self) -> tuple[str, ...]:
        """What to put before a command so that it runs on this host."""
        return ("ip", "netns", "exec", self.namespace)


@contextmanager
def shaped_hosts(num_hosts: int, *, rate_mbit: float) -> Iterator[tuple[Host, ...]]:
    """Hosts on one switch for as long as the context lasts.

    Whatever ends it (an exception, a failure half-way through, SIGINT, SIGTERM), the processes still running on a host
    are killed and the network is taken down; inside, SIGTERM raises SystemExit where the caller is the main thread.
    What a run killed by SIGKILL left behind is removed by the next call.

    Args:
        num_hosts: Number of hosts, 1 to 254.
        rate_mbit: Rate of every host's link in Mbit/s, in each direction.

    Yields:
        The hosts, each reachable by the others under its address.

    Raises:
        ValueError: Where an argument is out of its range.
        NetworkError: Where this machine cannot make such networks.
    """
    if not 1 <= num_hosts <= MAX_HOSTS:
        raise ValueError(f"num_hosts: got {num_hosts}, accepts 1 to {MAX_HOSTS}")
    if not (math.isfinite(rate_mbit) and rate_mbit > 0):
        raise ValueError(f"rate_mbit: got {rate_mbit}, accepts a positive number of Mbit/s")
    name, owner = _new_name(), os.getpid()
    with _Signals() as signals:
        reason = unavailable()
        if reason is not None:
            raise NetworkError(f"shaped links cannot be made here: {reason}; {FIX}")
        _remove(_leftovers())
        try:
            try:
                yield _build(name, num_hosts, rate_mbit)
            finally:
                signals.hold_back()  # may itself be interrupted, hence the outer finally
        finally:
            signals.hold_back()
            if os.getpid() == owner:  # not in a fork of it
                _take_down(name)


def set_rate(hosts: Sequence[Host], rate_mbit: float) -> None:
    """Change the rate of all links of a network while it is used; any process of root on this machine may.

    Args:
        hosts: All hosts of one network, in their order.
        rate_mbit: The new rate in Mbit/s, in each direction; 0 takes the limit away.

    Raises:
        ValueError: Where the rate is out of its range.
        NetworkError: Where a link cannot be changed.
    """
    if not (math.isfinite(rate_mbit) and rate_mbit >= 0):
        raise ValueError(f"rate_mbit: got {rate_mbit}, accepts a number of Mbit/s of at least 0")
    for index, host in enumerate(hosts):
        switch = f"{host.namespace.rpartition('-')[0]}-sw"
        for namespace, interface in ((host.namespace, host.interface), (switch, f"port{index}")):
            _shape(namespace, interface, rate_mbit)


def unavailable() -> str | None:
    """Why this machine cannot make shaped networks, found by trying; None where it can."""
    if sys.platform != "linux":
        return f"network namespaces need Linux, this is {sys.platform}"
    if os.geteuid() != 0:
        return "this is not root"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    name = _new_name()
    try:
        _build(name, 1, 1.0)
    except NetworkError as error:
        return f"refused: {error}"
    finally:
        _take_down(name)
    return None


class _Signals:
    """Turns SIGTERM and SIGINT into exceptions; those that come after `hold_back` are raised at the end."""

    def __init__(self) -> None:
        self._previous: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}
        self._holding = False
        self._held: int | None = None

    def __enter__(self) -> "_Signals":
        if threading.current_thread() is threading.main_thread():
            taken = [signal.SIGTERM]
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                taken.append(signal.SIGINT)
            for number in taken:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if self._held is not None:
            raise _as_exception(self._held)

    def hold_back(self) -> None:
        self._holding = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._holding:
            raise _as_exception(number)
        self._held = number


def _as_exception(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)


def _build(name: str, num_hosts: int, rate_mbit: float) -> tuple[Host, ...]:
    switch = f"{name}-sw"
    _tool("ip", "netns", "add", switch)
    _tool("ip", "-n", switch, "link", "set", "lo", "up")
    _tool("ip", "-n", switch, "link", "add", "bridge0", "type", "bridge")
    _tool("ip", "-n", switch, "link", "set", "bridge0", "up")
    return tuple(_join(switch, f"{name}-h{index}", index, rate_mbit) for index in range(num_hosts))


def _join(switch: str, namespace: str, index: int, rate_mbit: float) -> Host:
    """A new host on the switch; interface names are at most 15 characters, and no two namespaces share theirs."""
    host = Host(namespace=namespace, interface="link0", address=f"10.77.0.{index + 1}")
    port = f"port{index}"
    _tool("ip", "netns", "add", namespace)
    _tool("ip", "-n", namespace, "link", "set", "lo", "up")
    _tool("ip", "-n", namespace, "link", "add", host.interface, "type", "veth", "peer", "name", port, "netns", switch)
    _tool("ip", "-n", namespace, "addr", "add", f"{host.address}/24", "dev", host.interface)
    _shape(namespace, host.interface, rate_mbit)
    _shape(switch, port, rate_mbit)
    _tool("ip", "-n", switch, "link", "set", port, "master", "bridge0", "up")
    _tool("ip", "-n", namespace, "link", "set", host.interface, "up")
    return host


def _shape(namespace: str, interface: str, rate_mbit: float) -> None:
    queue = ("tbf", "rate", f"{max(1, round(rate_mbit * 1e6))}bit", *SHAPE) if rate_mbit else ("pfifo",)
    _tool("tc", "-n", namespace, "qdisc", "replace", "dev", interface, "root", *queue)


def _tool(*command: str) -> str:
    """What a command prints; in a session of its own, the terminal's interrupt does not reach it."""
    done = subprocess.run(command, capture_output=True, text=True, start_new_session=True)
    if done.returncode != 0:
        raise NetworkError(f"{' '.join(command)}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout


def _new_name() -> str:
    return f"quartet-{os.getpid()}-{_started(os.getpid())}-{next(_numbers)}"


def _started(pid: int) -> str | None:
    """When a process started, in the kernel's ticks since boot; None where it is no more."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _namespaces() -> list[str]:
    return [line.split()[0] for line in _tool("ip", "netns", "list").splitlines() if line.strip()]


def _leftovers() -> list[str]:
    """Namespaces of processes that are no more."""
    matches = [match for name in _namespaces() if (match := OURS.fullmatch(name))]
    return [match.group() for match in matches if _started(int(match["pid"])) != match["started"]]


def _take_down(name: str) -> None:
    """Remove all of a network there is, be it whole or half-built."""
    with contextlib.suppress(NetworkError):
        _remove([namespace for namespace in _namespaces() if namespace.startswith(f"{name}-")])


def _remove(namespaces: list[str]) -> None:
    """Kill what runs in namespaces and delete them; another process may be doing the same."""
    for namespace in namespaces:
        with contextlib.suppress(NetworkError):
            _kill(namespace)
        with contextlib.suppress(NetworkError):
            _tool("ip", "netns", "delete", namespace)
    remaining = set(namespaces) & set(_namespaces()) if namespaces else set()
    if remaining:
        logger.warning("could not remove %s; remove by: ip netns delete NAME", ", ".join(sorted(remaining)))


def _kill(namespace: str, patience_s: float = 5.0) -> None:
    """Kill the processes of a namespace and wait until they are gone."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        found = {int(pid) for pid in _tool("ip", "netns", "pids", namespace).split()} - {os.getpid()}
        if not found:
            return
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
