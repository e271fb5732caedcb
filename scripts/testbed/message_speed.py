"""What a message between ranks takes, and what it costs the thread that computes beside it.

Everything is an asynchronous all-to-all of equal shares, as the runtime sends them; sizes are bytes that leave a rank.
"""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from scripts.testbed.peers import MoESizes

KIB = 1024
MESSAGE_BYTES = tuple(KIB * 4**power for power in range(2, 8))  # 16 KiB to 16 MiB
TOGETHER_BYTES = 1024 * KIB
TRAIN_BYTES = 8 * 1024 * KIB  # far more than what a shaped link lets pass at once
BURST_BYTES = 512 * KIB
COPIED_BYTES = 4 * 1024 * KIB
SKEWED_ROWS = 512  # of a product that takes about as long as those between the messages of a step
LEAST_SPEED = 0.01
PAUSE_S = 0.05  # in which a shaped link forgets what was sent
MOST_MESSAGES = 64
BUSY_S = 0.15  # how long a stream is kept busy while another is timed
GLOO_THREADS = 2  # of a process group, by torch's own default: so many messages are under way at once


def measure_messages(sizes: MoESizes, num_ranks: int, repeats: int) -> dict[str, Any]:
    """Measure messages, on every rank at once.

    Args:
        sizes: Of the layer whose products run beside messages.
        num_ranks: Ranks that take part.
        repeats: Timings per figure, of which the median counts.

    Returns:
        `message` (latency, and points of bytes and bytes/s), `burst_us`, `send_us`, `together_gain` and
        `interference`, the relative speeds of streams that are busy beside messages.
    """
    send_us, lost_us = (_lost_us(size, sizes, num_ranks, repeats) for size in (MESSAGE_BYTES[0], TOGETHER_BYTES))
    lost_share = max(0.0, lost_us - send_us) / (1e6 * _sustained_s(TOGETHER_BYTES, num_ranks, repeats))
    return {
        "message": _messages(sizes, num_ranks, repeats, send_us=send_us),
        "burst_us": _burst_us(num_ranks, repeats),
        "send_us": send_us,
        "together_gain": _together_gain(num_ranks, repeats),
        "interference": _interference(sizes, num_ranks, repeats, compute=max(LEAST_SPEED, 1 - lost_share)),
    }


def growing(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points whose times grow with the volume, as a device's must: noise may turn two around.

    Args:
        points: (volume, volume per second), in the order of volumes.
    """
    kept: list[tuple[float, float]] = []
    for volume, rate in points:
        fastest = volume * kept[-1][1] / kept[-1][0] * (1 - 1e-9) if kept else rate
        kept.append((volume, min(rate, fastest)))
    return kept


def median_s(call: Callable[[], object], repeats: int, *, together: bool = False) -> float:
    """Median seconds of a call, after one that does not count.

    Args:
        call: What to time.
        repeats: How often.
        together: Whether ranks start at once.
    """
    times_s = []
    for _ in range(repeats + 1):
        if together:
            dist.barrier()
        times_s.append(elapsed_s(call))
    return statistics.median(times_s[1:])


def elapsed_s(call: Callable[[], object]) -> float:
    """Seconds of a call.

    Args:
        call: What to time.
    """
    start_ns = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start_ns) / 1e9


def _messages(sizes: MoESizes, num_ranks: int, repeats: int, *, send_us: float) -> dict[str, Any]:
    """Bytes that leave a rank -> bytes/s of one message after the other, and what the first one takes beside.

    A link that lets some bytes pass at once does so only after a pause, so rates are those of trains. In a step a
    message follows upon products: the threads that carry it wake up, and the other ranks have yet to get there.
    """
    times_s = [_sustained_s(size, num_ranks, repeats) for size in MESSAGE_BYTES]
    slope_s = (times_s[-1] - times_s[-2]) / (MESSAGE_BYTES[-1] - MESSAGE_BYTES[-2])
    following_s = max(0.0, times_s[0] - slope_s * MESSAGE_BYTES[0])
    points = [
        (float(num_bytes), num_bytes / max(1e-9, elapsed_s - following_s))
        for num_bytes, elapsed_s in zip(MESSAGE_BYTES, times_s, strict=True)
    ]
    work, message, first_s = _product_of(sizes, SKEWED_ROWS), _Message(MESSAGE_BYTES[0], num_ranks), []
    for _ in range(3 * repeats):
        dist.barrier()
        work()
        first_s.append(elapsed_s(message.send))
    latency_us = 1e6 * (statistics.median(first_s) - (times_s[0] - following_s)) - send_us
    return {"latency_us": max(0.0, latency_us), "points": growing(points)}


def _sustained_s(leaving_bytes: int, num_ranks: int, repeats: int) -> float:
    """Of a message that follows upon others of its size."""
    message = _Message(leaving_bytes, num_ranks)
    number = max(1, TRAIN_BYTES // leaving_bytes)
    return median_s(lambda: _send_in_turn(message, number), repeats, together=True) / number


def _burst_us(num_ranks: int, repeats: int) -> float:
    """How much sooner a message is over if nothing was sent for a while: a shaped link lets its first bytes pass."""
    message, times_s = _Message(BURST_BYTES, num_ranks), []
    for _ in range(repeats):
        time.sleep(PAUSE_S)
        dist.barrier()
        times_s.append(elapsed_s(message.send))
    return max(0.0, 1e6 * (_sustained_s(BURST_BYTES, num_ranks, repeats) - statistics.median(times_s)))


def _lost_us(leaving_bytes: int, sizes: MoESizes, num_ranks: int, repeats: int) -> float:
    """What a message costs the thread that starts it and computes on: threads that carry it want the core, too."""
    work, message = _product_of(sizes, SKEWED_ROWS), _Message(leaving_bytes, num_ranks)
    alone_s, beside_s = [], []
    for _ in range(3 * repeats):
        dist.barrier()
        work()
        alone_s.append(elapsed_s(work))
        start_ns = time.perf_counter_ns()
        sent = message.start()
        work()
        beside_s.append((time.perf_counter_ns() - start_ns) / 1e9)
        sent.wait()
    return max(0.0, 1e6 * (statistics.median(beside_s) - statistics.median(alone_s)))


def _together_gain(num_ranks: int, repeats: int) -> float:
    """Rate of as many messages as may be under way at once, relative to that of one."""
    messages = [_Message(TOGETHER_BYTES, num_ranks) for _ in range(GLOO_THREADS)]
    alone_s = median_s(messages[0].send, 3 * repeats, together=True)
    gain = len(messages) * alone_s / median_s(lambda: _send_all(messages), 3 * repeats, together=True)
    return min(float(len(messages)), max(1.0, gain))


def _interference(sizes: MoESizes, num_ranks: int, repeats: int, *, compute: float) -> dict[str, float]:
    """Relative speeds of compute, which is given, of copies and of messages while both streams are busy."""
    copy_from = torch.ones(COPIED_BYTES, dtype=torch.uint8)
    copy = functools.partial(torch.empty_like(copy_from).copy_, copy_from)
    train = [_Message(TOGETHER_BYTES, num_ranks)] * _busy_messages(num_ranks, repeats)
    _, comm_beside_compute = _beside(train, _product_of(sizes), repeats)
    copy_beside_comm, comm_beside_copy = _beside(train, copy, repeats)
    return {
        "compute_beside_comm": compute,
        "comm_beside_compute": comm_beside_compute,
        "copy_beside_comm": copy_beside_comm,
        "comm_beside_copy": comm_beside_copy,
    }


def _beside(train: Sequence["_Message"], work: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Relative speeds of work and of messages while both are done."""
    work_alone_s = median_s(work, repeats)
    alone_s, beside_s, work_s = [], [], []
    for _ in range(repeats):
        alone_s.append(median_s(lambda: _send_all(train), 1, together=True))
        dist.barrier()
        start_ns = time.perf_counter_ns()
        under_way = [message.start() for message in train]
        while not under_way[-1].is_completed():
            work_s.append(elapsed_s(work))
        for message in under_way:
            message.wait()
        beside_s.append((time.perf_counter_ns() - start_ns) / 1e9)
    return (
        min(1.0, work_alone_s / statistics.mean(work_s or [work_alone_s])),
        min(1.0, statistics.median(alone_s) / statistics.median(beside_s)),
    )


def _product_of(sizes: MoESizes, rows: int = 128) -> Callable[[], object]:
    x_RM, up_HM = torch.randn(rows, sizes.d_model), torch.randn(sizes.d_hidden, sizes.d_model)
    out_RH = torch.empty(rows, sizes.d_hidden)
    return functools.partial(torch.mm, x_RM, up_HM.t(), out=out_RH)


def _busy_messages(num_ranks: int, repeats: int) -> int:
    """How many messages take about as long as a stream is to be kept busy, the same on every rank."""
    elapsed_s = torch.tensor(median_s(_Message(TOGETHER_BYTES, num_ranks).send, repeats, together=True))
    dist.all_reduce(elapsed_s, dist.ReduceOp.MAX)
    return min(MOST_MESSAGES, max(1, round(BUSY_S / float(elapsed_s))))


def _send_in_turn(message: "_Message", number: int) -> None:
    for _ in range(number):
        message.send()


def _send_all(train: Sequence["_Message"]) -> None:
    for under_way in [message.start() for message in train]:
        under_way.wait()


class _Message:
    """An all-to-all of equal shares, so many bytes of which leave each rank."""

    def __init__(self, leaving_bytes: int, num_ranks: int) -> None:
        share = leaving_bytes // (num_ranks - 1)
        self._sent = torch.ones(num_ranks * share, dtype=torch.uint8)
        self._received = torch.empty_like(self._sent)

    def start(self) -> dist.Work:
        """Send without waiting."""
        return dist.all_to_all_single(self._received, self._sent, async_op=True)

    def send(self) -> None:
        """Send and wait."""
        self.start().wait()
