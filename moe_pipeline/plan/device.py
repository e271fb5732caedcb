"""Device: how fast a machine multiplies, sends, copies and moves rows, alone and while it does something else.

A device is read from a JSON file: one that comes with the package (`device_names`), or one that
`scripts.tune experiment=moe_pipeline/calibrate` wrote. Nothing in a file is trusted: every field must be there, known
and in range.
"""

import json
import sys
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

from moe_pipeline.plan.schedule import Stream

FOLDER = Path(__file__).parent / "devices"
PAYS_ABOVE = 0.5  # below this relative speed two operations are as fast one after the other
_STREAMS: tuple[Stream, ...] = get_args(Stream)


class DeviceError(ValueError):
    """A device file that cannot be used; the message names the file, the field, what came and what is accepted.

    Source: not in the paper.
    """


@dataclass(frozen=True)
class Speed:
    """How long work of some volume takes: a latency, and a rate that grows with the volume until it saturates.

    Source: MPMoE (IEEE TPDS 2024) section 4.2: speeds are piecewise-linear functions of the volume.
    """

    latency_us: float
    points: tuple[tuple[float, float], ...]
    """(volume, volume per second) in the order of volumes; between points the rate is on a line, outside constant."""

    def rate(self, volume: float) -> float:
        """Volume per second beside the latency.

        Args:
            volume: FLOP or bytes.

        Source: as `Speed`.
        """
        volumes = [point[0] for point in self.points]
        after = bisect_left(volumes, volume)
        if after == 0 or after == len(volumes):
            return self.points[min(after, len(volumes) - 1)][1]
        (low, slow), (high, fast) = self.points[after - 1], self.points[after]
        return slow + (fast - slow) * (volume - low) / (high - low)

    def time_us(self, volume: float) -> float:
        """Microseconds for a volume; none for none.

        Args:
            volume: FLOP or bytes.

        Source: as `Speed`.
        """
        return self.latency_us + 1e6 * volume / self.rate(volume) if volume else 0.0


@dataclass(frozen=True)
class Interference:
    """The speed of one stream relative to its speed alone, while others run.

    Source: MPipeMoE (arXiv:2506.22175) figure 3 and equation 10; MPMoE (IEEE TPDS 2024) section 2.3, alpha(y, x).
    """

    table: tuple[tuple[Stream, tuple[tuple[str, float], ...]], ...]
    """y -> x -> alpha(y, x), x being another stream or "all"."""

    def alpha(self, stream: Stream, others: frozenset[Stream] = frozenset()) -> float:
        """Relative speed of a stream.

        Args:
            stream: y.
            others: The streams that run beside it.

        Source: as `Interference`.
        """
        others = others - {stream}
        if not others:
            return 1.0
        beside = "all" if len(others) > 1 else next(iter(others))
        return dict(dict(self.table)[stream])[beside]

    def pays(self, stream: Stream, other: Stream) -> bool:
        """Whether running two streams at once is faster than one after the other.

        Args:
            stream: One.
            other: The other.

        Source: MPipeMoE (arXiv:2506.22175) section II-C.
        """
        pair = self.alpha(stream, frozenset({other})), self.alpha(other, frozenset({stream}))
        return min(pair) > PAYS_ABOVE


@dataclass(frozen=True, kw_only=True)
class Device:
    """A rank's machine and its links.

    Source: MPipeMoE (arXiv:2506.22175) section III-E (F, A, D and the slowdowns); what is counted beside them is ours.
    """

    name: str
    origin: str
    """Where the figures come from: measured, published, fitted or assumed, in words."""
    product: Speed
    """Matrix products, in FLOP; the paper's F."""
    message: Speed
    """All-to-all inside a node, in bytes that leave a rank; the paper's A."""
    node_message: Speed
    """The same for bytes that leave the node."""
    ranks_per_node: int
    peer_us: float
    """What each further rank adds to the latency of an all-to-all."""
    copy: Speed
    """Copies to and from the host, in bytes; the paper's D."""
    rows: Speed
    """Gathers, sums and activations, in bytes read and written."""
    outside: Speed
    """What a step does outside its schedules (gate, routing, agreement), in rows."""
    interference: Interference
    one_thread: bool
    """Whether the thread that computes also copies, issues and waits, as on a CPU."""
    issue_us: float
    """What issuing an operation costs that thread; streams of a GPU are filled ahead."""
    send_us: float
    """What an all-to-all costs that thread beside: to start it, and the core's time that goes to what carries it."""
    burst_us: float
    """What a link that has rested sends at once, as the time that it takes otherwise; for links with a token bucket."""
    messages_at_once: int
    """All-to-alls that share the link when several are under way; 1 where they queue."""
    together_gain: float
    """Rate of so many at once, of all together, relative to one alone: one may leave a direction of the link idle."""
    memory_bytes: int
    host_bytes: int
    pinned: bool
    """Whether host memory can be copied to beside compute."""

    def message_us(self, leaving_bytes: float, num_ranks: int) -> float:
        """Time of an all-to-all in which a rank sends equally much to all others.

        Args:
            leaving_bytes: Bytes that leave the rank.
            num_ranks: N, the rank itself included.

        Source: not in the paper, which takes one rate for all.
        """
        if num_ranks < 2 or not leaving_bytes:
            return 0.0
        near = min(self.ranks_per_node, num_ranks) - 1
        far = num_ranks - 1 - near
        inside = self.message.time_us(leaving_bytes * near / (near + far))
        between = self.node_message.time_us(leaving_bytes * far / (near + far))
        return max(inside, between) + self.peer_us * (num_ranks - 2)


def device_names() -> list[str]:
    """The devices that come with the package; not in the paper."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load_device(name: str | Path) -> Device:
    """Read a device.

    Args:
        name: One of `device_names`, or the path of a file.

    Returns:
        The device.

    Raises:
        DeviceError: If there is no such file, or a field is missing, unknown or out of range.

    Source: not in the paper.
    """
    path = FOLDER / f"{name}.json" if str(name) in device_names() else Path(name)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        accepted = f"one of {device_names()} or the path of a file"
        raise DeviceError(f"device: got {str(name)!r} ({error.strerror}); accepted is {accepted}") from error
    except (ValueError, RecursionError) as error:  # of the decoder, of json, and of integers with too many digits
        raise DeviceError(f"{path}: is not JSON ({error}); write it again or take one of {device_names()}") from error
    return parse_device(content, where=str(path))


def parse_device(content: object, *, where: str = "device") -> Device:
    """Check what a file holds.

    Args:
        content: Parsed JSON.
        where: Its name, for errors.

    Returns:
        The device.

    Raises:
        DeviceError: As `load_device`.

    Source: not in the paper.
    """
    found = _fields(content, {field.name for field in fields(Device)}, where)
    values: dict[str, Any] = {}
    for field in fields(Device):
        value, name = found[field.name], f"{where}: {field.name}"
        if field.type is Speed:
            values[field.name] = _speed(value, name)
        elif field.type is Interference:
            values[field.name] = _interference(value, name)
        elif field.type is float:
            values[field.name] = _number(value, name, low=0.0)
        elif type(value) is not field.type or (isinstance(value, int) and value < 1 and field.type is int):
            accepted = {str: "text", bool: "true or false", int: "an integer of at least 1"}[field.type]  # type: ignore[index]
            raise DeviceError(f"{name}: got {value!r}; accepted is {accepted}")
        else:
            values[field.name] = value
    return Device(**values)


def device_json(device: Device) -> str:
    """A device as the text of its file; `load_device` reads it back equal.

    Args:
        device: Any.

    Source: not in the paper.
    """
    content: dict[str, object] = {}
    for field in fields(Device):
        value = getattr(device, field.name)
        if isinstance(value, Speed):
            value = {"latency_us": value.latency_us, "points": [list(point) for point in value.points]}
        elif isinstance(value, Interference):
            value = {stream: dict(row) for stream, row in value.table}
        content[field.name] = value
    return json.dumps(content, indent=2) + "\n"


def interference(table: Mapping[str, Mapping[str, float]]) -> Interference:
    """A table from mappings.

    Args:
        table: y -> x -> alpha(y, x).

    Returns:
        The table.

    Raises:
        DeviceError: If an entry is missing, unknown or out of range.

    Source: as `Interference`.
    """
    return _interference(table, "interference")


def _fields(content: object, names: set[str], where: str) -> Mapping[str, object]:
    if not isinstance(content, Mapping):
        raise DeviceError(f"{where}: got {content!r}; accepted is an object with the fields {sorted(names)}")
    missing, unknown = sorted(names - content.keys()), sorted(content.keys() - names)
    if missing or unknown:
        problem = f"lacks {missing}" if missing else f"has the unknown {unknown}"
        raise DeviceError(f"{where}: {problem}; accepted are exactly the fields {sorted(names)}")
    return content


def _number(value: object, where: str, *, low: float, high: float = sys.float_info.max) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        limits = f"of at least {low:g}" if high == sys.float_info.max else f"from {low:g} to {high:g}"
        raise DeviceError(f"{where}: got {value!r}; accepted is a finite number {limits}")
    return float(value)


def _speed(value: object, where: str) -> Speed:
    found = _fields(value, {"latency_us", "points"}, where)
    points = found["points"]
    if not isinstance(points, list) or not points or not all(isinstance(p, list) and len(p) == 2 for p in points):
        raise DeviceError(f"{where}.points: got {points!r}; accepted is a list of [volume, volume per second]")
    pairs = [
        (_number(volume, f"{where}.points", low=0.0), _number(rate, f"{where}.points", low=1e-9))
        for volume, rate in points
    ]
    for (low, slow), (high, fast) in pairwise(pairs):
        if high <= low or high / fast < low / slow:
            raise DeviceError(
                f"{where}.points: got {[low, slow]} before {[high, fast]}; accepted are growing volumes that take "
                "growing times"
            )
    return Speed(_number(found["latency_us"], f"{where}.latency_us", low=0.0), tuple(pairs))


def _interference(value: object, where: str) -> Interference:
    rows = _fields(value, set(_STREAMS), where)
    table = []
    for stream in _STREAMS:
        beside = [other for other in _STREAMS if other != stream] + ["all"]
        row = _fields(rows[stream], set(beside), f"{where}.{stream}")
        factors = tuple(
            (other, _number(row[other], f"{where}.{stream}.{other}", low=0.01, high=1.0)) for other in beside
        )
        table.append((stream, factors))
    return Interference(tuple(table))
