"""Micro-benchmarks of a rank's machine: what a device file says of it.

Everything is timed through the very calls the runtime makes: products by `torch.mm` into memory that is there, rows by
`index_select`, messages by asynchronous all-to-alls. Interference is what is left of a speed while another stream is
kept busy.
"""

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_pipeline import PipelineConfig
from moe_pipeline.layer import recorded
from moe_pipeline.plan.call import plan_call
from moe_pipeline.plan.device import Device, Interference, Speed, interference
from moe_pipeline.plan.partition import partition
from moe_pipeline.run.ranks import expert_ranks
from scripts.testbed.benchmarks.own_layer import own_layer, step
from scripts.testbed.network import Host
from scripts.testbed.peers import MoESizes
from scripts.testbed.ranks import run_ranks

KIB = 1024
COLD_EXPERTS = 16  # whose weights and gradients do not fit into a core's caches together
PRODUCT_ROWS = (32, 128, 512, 2048)
ROWS_BYTES = tuple(KIB * 4**power for power in range(4, 9))  # 256 KiB to 64 MiB
COPIED_BYTES = 4 * 1024 * KIB
MESSAGE_BYTES = tuple(KIB * 4**power for power in range(2, 8))  # 16 KiB to 16 MiB
TOGETHER_BYTES = 1024 * KIB
OUTSIDE_TOKENS = (256, 1024, 4096)
TINY, MANY_CHUNKS = 8, 8  # sizes of a layer whose operations take no time but that to issue them
MOST_MESSAGES = 64
BUSY_S = 0.15  # how long a stream is kept busy while another is timed
GLOO_THREADS = 2  # of a process group, by torch's own default: so many messages are under way at once


def calibrate(
    sizes: MoESizes,
    *,
    hosts: Sequence[Host],
    num_ranks: int,
    folder: Path,
    repeats: int,
    name: str,
    timeout_s: float = 900.0,
) -> Device:
    """Measure a device: a CPU core per rank, and the link between ranks.

    Args:
        sizes: The layer whose widths products and rows have; speeds hold for others of about that size.
        hosts: One for each rank, joined by the link; where empty, loopback is measured.
        num_ranks: Ranks that take part.
        folder: Where the ranks write.
        repeats: Timings per point, of which the median counts.
        name: The device's name.
        timeout_s: Time for everything, in seconds.

    Raises:
        RankError: Where a rank fails or time is up.
    """
    argument: dict[str, object] = {"sizes": asdict(sizes), "repeats": repeats}
    found = run_ranks(
        f"{__name__}:measure", argument, num_ranks=num_ranks, folder=folder, hosts=hosts, timeout_s=timeout_s
    )[0]
    speeds = {
        field: Speed(found[field]["latency_us"], tuple((volume, rate) for volume, rate in found[field]["points"]))
        for field in ("product", "message", "copy", "rows", "outside")
    }
    return Device(
        name=name,
        origin="Measured by scripts.tune experiment=moe_pipeline/calibrate.",
        **speeds,
        node_message=speeds["message"],
        ranks_per_node=1,
        peer_us=0.0,
        interference=_interference(found["interference"]),
        one_thread=True,
        issue_us=found["issue_us"],
        send_us=found["send_us"],
        messages_at_once=GLOO_THREADS,
        together_gain=found["together_gain"],
        memory_bytes=found["memory_bytes"],
        host_bytes=found["memory_bytes"],
        pinned=True,
    )


def measure(rank: int, num_ranks: int, argument: dict[str, Any]) -> dict[str, Any]:
    """One rank's part; the figures of rank 0 are used.

    Args:
        rank: This rank.
        num_ranks: Number of ranks.
        argument: `sizes` and `repeats`.

    Returns:
        The fields of the device that are measured.
    """
    sizes, repeats = MoESizes(**argument["sizes"]), argument["repeats"]
    send_us = _sending_us(sizes, num_ranks, repeats)
    return {
        "product": _products(sizes, repeats),
        "rows": _rows(sizes, repeats),
        "message": _messages(num_ranks, repeats, send_us=send_us),
        "copy": _copies(repeats),
        "outside": _outside(sizes, repeats),
        "issue_us": _issuing_us(sizes, num_ranks, repeats),
        "send_us": send_us,
        "together_gain": _together_gain(num_ranks, repeats),
        "interference": _beside_messages(sizes, num_ranks, repeats),
        "memory_bytes": _memory_bytes(),
    }


def _products(sizes: MoESizes, repeats: int) -> dict[str, Any]:
    """FLOP per product -> FLOP/s, over the six products of an expert's forward and backward.

    A step uses each expert's weights once: here, too, they come from memory, of one expert after the other.
    """
    width, hidden = sizes.d_model, sizes.d_hidden
    experts = itertools.cycle(
        [[torch.randn(size) for size in ((hidden, width), (width, hidden)) * 2] for _ in range(COLD_EXPERTS)]
    )
    points = []
    for rows in PRODUCT_ROWS:
        x_RM, hidden_RH, out_RM = torch.randn(rows, width), torch.randn(rows, hidden), torch.empty(rows, width)
        out_RH = torch.empty(rows, hidden)

        def products() -> None:
            up_HM, down_MH, grad_HM, grad_MH = next(experts)
            torch.mm(x_RM, up_HM.t(), out=out_RH)  # noqa: B023
            torch.mm(hidden_RH, down_MH.t(), out=out_RM)  # noqa: B023
            torch.mm(x_RM, down_MH, out=out_RH)  # noqa: B023
            torch.mm(hidden_RH, up_HM, out=out_RM)  # noqa: B023
            torch.mm(x_RM.t(), hidden_RH, out=grad_MH)  # noqa: B023
            torch.mm(hidden_RH.t(), x_RM, out=grad_HM)  # noqa: B023

        flops = 2.0 * rows * width * hidden
        points.append((flops, 6 * flops / _median_s(products, repeats)))
    return {"latency_us": 0.0, "points": _growing(points)}


def _rows(sizes: MoESizes, repeats: int) -> dict[str, Any]:
    """Bytes read and written by a gather -> bytes/s."""
    points = []
    for num_bytes in ROWS_BYTES:
        rows = num_bytes // (8 * sizes.d_model)
        from_RM, to_RM = torch.randn(rows, sizes.d_model), torch.empty(rows, sizes.d_model)
        order_R = torch.randperm(rows)
        gather = functools.partial(torch.index_select, from_RM, 0, order_R, out=to_RM)
        elapsed_s = _median_s(gather, repeats)
        points.append((float(num_bytes), num_bytes / elapsed_s))
    return {"latency_us": 0.0, "points": _growing(points)}


def _messages(num_ranks: int, repeats: int, *, send_us: float) -> dict[str, Any]:
    """Bytes that leave a rank -> bytes/s, beside the latency of the smallest; what sending costs is counted apart."""
    times_s = [_median_s(_Message(size, num_ranks).send, repeats, together=True) for size in MESSAGE_BYTES]
    slope_s = (times_s[-1] - times_s[-2]) / (MESSAGE_BYTES[-1] - MESSAGE_BYTES[-2])
    latency_s = max(0.0, times_s[0] - slope_s * MESSAGE_BYTES[0])
    points = [
        (float(num_bytes), num_bytes / max(1e-9, elapsed_s - latency_s))
        for num_bytes, elapsed_s in zip(MESSAGE_BYTES, times_s, strict=True)
    ]
    return {"latency_us": max(0.0, 1e6 * latency_s - send_us), "points": _growing(points)}


def _sending_us(sizes: MoESizes, num_ranks: int, repeats: int) -> float:
    """What starting a small message costs a thread that has just computed and goes on computing."""
    work, message, times_s = _product_of(sizes), _Message(MESSAGE_BYTES[0], num_ranks), []
    for _ in range(repeats):
        dist.barrier()
        work()
        start_ns = time.perf_counter_ns()
        sent = message.start()
        times_s.append((time.perf_counter_ns() - start_ns) / 1e9)
        work()
        sent.wait()
    return 1e6 * statistics.median(times_s)


def _together_gain(num_ranks: int, repeats: int) -> float:
    """Rate of as many messages as may be under way at once, relative to that of one."""
    messages = [_Message(TOGETHER_BYTES, num_ranks) for _ in range(GLOO_THREADS)]
    alone_s = _median_s(messages[0].send, 3 * repeats, together=True)
    gain = len(messages) * alone_s / _median_s(lambda: _send_all(messages), 3 * repeats, together=True)
    return min(float(len(messages)), max(1.0, gain))


def _copies(repeats: int) -> dict[str, Any]:
    points = []
    for num_bytes in ROWS_BYTES:
        source, target = torch.ones(num_bytes, dtype=torch.uint8), torch.empty(num_bytes, dtype=torch.uint8)
        elapsed_s = _median_s(functools.partial(target.copy_, source), repeats)
        points.append((float(num_bytes), num_bytes / elapsed_s))
    return {"latency_us": 0.0, "points": _growing(points)}


def _outside(sizes: MoESizes, repeats: int) -> dict[str, Any]:
    """Rows -> rows/s of what a step does outside its schedules, at n=1."""
    layer = own_layer(sizes, seed=0, pipeline=PipelineConfig(overlap=False), ranks=expert_ranks())
    times_us = []
    for tokens in OUTSIDE_TOKENS:
        x_TM, grad_TM = torch.randn(tokens, sizes.d_model), torch.randn(tokens, sizes.d_model)
        found = []
        for _ in range(repeats + 1):
            dist.barrier()
            with recorded(layer) as recorder:
                start_ns = time.perf_counter_ns()
                step(layer, x_TM, grad_TM)
                whole_us = (time.perf_counter_ns() - start_ns) / 1e3
            inside_us = sum(span.stop_us - span.start_us for span in recorder.timeline().spans)
            found.append(whole_us - inside_us)
        times_us.append(max(1.0, statistics.median(found[1:])))
    rows = [tokens * sizes.top_k for tokens in OUTSIDE_TOKENS]
    slope_us = max(1e-6, (times_us[-1] - times_us[0]) / (rows[-1] - rows[0]))
    return {"latency_us": max(0.0, times_us[0] - slope_us * rows[0]), "points": [(float(rows[0]), 1e6 / slope_us)]}


def _issuing_us(sizes: MoESizes, num_ranks: int, repeats: int) -> float:
    """What one more operation costs a step of a layer that has next to nothing to compute."""
    experts = sizes.num_experts // num_ranks
    tiny = replace(sizes, num_experts=experts, top_k=1, d_model=TINY, d_hidden=TINY)
    data = torch.randn(2, TINY * MANY_CHUNKS * experts, TINY)
    times_s, operations = [], []
    for num_chunks in (1, MANY_CHUNKS):
        config = PipelineConfig(num_chunks=num_chunks)
        layer = own_layer(tiny, seed=0, pipeline=config)
        times_s.append(_median_s(functools.partial(step, layer, *data), 3 * repeats))
        plan = plan_call("issuing", config, partition(((1,),), ((1,),), num_chunks=num_chunks))
        operations.append(len(plan.forward.ops) + len(plan.backward.ops))
    return max(0.0, 1e6 * (times_s[1] - times_s[0]) / (operations[1] - operations[0]))


def _beside_messages(sizes: MoESizes, num_ranks: int, repeats: int) -> dict[str, float]:
    """Relative speeds of compute, of copies and of messages while both streams are busy."""
    copy_from = torch.ones(COPIED_BYTES, dtype=torch.uint8)
    copy_to = torch.empty_like(copy_from)
    train = [_Message(TOGETHER_BYTES, num_ranks)] * _busy_messages(num_ranks, repeats)
    found = {}
    for name, work in (("compute", _product_of(sizes)), ("copy", functools.partial(copy_to.copy_, copy_from))):
        work_alone_s = _median_s(work, repeats)
        alone_s, beside_s, work_s = [], [], []
        for _ in range(repeats):
            alone_s.append(_median_s(lambda: _send_all(train), 1, together=True))
            dist.barrier()
            start_ns = time.perf_counter_ns()
            under_way = [message.start() for message in train]
            while not under_way[-1].is_completed():
                work_start_ns = time.perf_counter_ns()
                work()
                work_s.append((time.perf_counter_ns() - work_start_ns) / 1e9)
            for message in under_way:
                message.wait()
            beside_s.append((time.perf_counter_ns() - start_ns) / 1e9)
        found[f"{name}_beside_comm"] = min(1.0, work_alone_s / statistics.mean(work_s or [work_alone_s]))
        found[f"comm_beside_{name}"] = min(1.0, statistics.median(alone_s) / statistics.median(beside_s))
    return found


def _product_of(sizes: MoESizes) -> Callable[[], object]:
    x_RM, up_HM = torch.randn(128, sizes.d_model), torch.randn(sizes.d_hidden, sizes.d_model)
    out_RH = torch.empty(128, sizes.d_hidden)
    return functools.partial(torch.mm, x_RM, up_HM.t(), out=out_RH)


def _busy_messages(num_ranks: int, repeats: int) -> int:
    """How many messages take about as long as a stream is to be kept busy, the same on every rank."""
    elapsed_s = torch.tensor(_median_s(_Message(TOGETHER_BYTES, num_ranks).send, repeats, together=True))
    dist.all_reduce(elapsed_s, dist.ReduceOp.MAX)
    return min(MOST_MESSAGES, max(1, round(BUSY_S / float(elapsed_s))))


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


def _median_s(call: Callable[[], object], repeats: int, *, together: bool = False) -> float:
    times_s = []
    for _ in range(repeats + 1):
        if together:
            dist.barrier()
        start_ns = time.perf_counter_ns()
        call()
        times_s.append((time.perf_counter_ns() - start_ns) / 1e9)
    return statistics.median(times_s[1:])


def _growing(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points whose times grow with the volume, as a device's must: noise may turn two around."""
    kept: list[tuple[float, float]] = []
    for volume, rate in points:
        fastest = volume * kept[-1][1] / kept[-1][0] * (1 - 1e-9) if kept else rate
        kept.append((volume, min(rate, fastest)))
    return kept


def _interference(found: dict[str, float]) -> Interference:
    compute, copy = found["compute_beside_comm"], found["copy_beside_comm"]
    beside_compute, beside_copy = found["comm_beside_compute"], found["comm_beside_copy"]
    return interference(
        {  # one thread computes and copies, so those two never run at once
            "compute": {"comm": compute, "copy": 1.0, "all": compute},
            "comm": {"compute": beside_compute, "copy": beside_copy, "all": min(beside_compute, beside_copy)},
            "copy": {"compute": 1.0, "comm": copy, "all": copy},
        }
    )


def _memory_bytes() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("MemTotal"):
            return int(line.split()[1]) * KIB
    raise RuntimeError("/proc/meminfo does not say how much memory there is")
