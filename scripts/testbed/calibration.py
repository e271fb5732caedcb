"""Micro-benchmarks of a rank's machine: what a device file says of it.

Everything is timed through the very calls the runtime makes: products by `torch.mm` into memory that is there, rows by
`index_select`, messages by asynchronous all-to-alls. Interference is what is left of a speed while another stream is
kept busy.
"""

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
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
from moe_pipeline.plan.timeline import Timeline
from moe_pipeline.run.ranks import expert_ranks
from scripts.testbed.benchmarks.own_layer import own_layer, step
from scripts.testbed.message_speed import GLOO_THREADS, elapsed_s, growing, measure_messages, median_s
from scripts.testbed.network import Host
from scripts.testbed.peers import MoESizes
from scripts.testbed.ranks import run_ranks

KIB = 1024
COLD_EXPERTS = 16  # whose weights and gradients do not fit into a core's caches together
PRODUCT_ROWS = (32, 128, 512, 2048)
ROWS_BYTES = tuple(KIB * 4**power for power in range(4, 9))  # 256 KiB to 64 MiB
COLD_BYTES = 16 * 1024 * KIB  # more than a core's own caches hold
OUTSIDE_TOKENS = (256, 1024, 4096)
TINY, MANY_CHUNKS = 8, 8  # sizes of a layer whose operations take no time but that to issue them


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
        burst_us=found["burst_us"],
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
    return {
        "product": _products(sizes, repeats),
        "rows": _rows(sizes, repeats),
        "copy": _copies(repeats),
        "outside": _outside(sizes, repeats),
        "issue_us": _issuing_us(sizes, num_ranks, repeats),
        "memory_bytes": _memory_bytes(),
        **measure_messages(sizes, num_ranks, repeats),
    }


def _products(sizes: MoESizes, repeats: int) -> dict[str, Any]:
    """FLOP per product -> FLOP/s of the slowest rank, over the six products of an expert's forward and backward.

    A step uses each expert's weights once and writes where it has not written for a while: here, too, they come from
    memory, of one expert after the other.
    """
    width, hidden = sizes.d_model, sizes.d_hidden
    experts = itertools.cycle(
        [[torch.randn(size) for size in ((hidden, width), (width, hidden)) * 2] for _ in range(COLD_EXPERTS)]
    )
    points = []
    for rows in PRODUCT_ROWS:
        shapes = ((rows, width), (rows, hidden), (rows, width), (rows, hidden))
        values = _cold(8 * rows * (width + hidden), lambda: [torch.randn(shape) for shape in shapes])  # noqa: B023

        def products() -> None:
            up_HM, down_MH, grad_HM, grad_MH = next(experts)
            x_RM, hidden_RH, out_RM, out_RH = next(values)  # noqa: B023
            torch.mm(x_RM, up_HM.t(), out=out_RH)
            torch.mm(hidden_RH, down_MH.t(), out=out_RM)
            torch.mm(x_RM, down_MH, out=out_RH)
            torch.mm(hidden_RH, up_HM, out=out_RM)
            torch.mm(x_RM.t(), hidden_RH, out=grad_MH)
            torch.mm(hidden_RH.t(), x_RM, out=grad_HM)

        flops = 2.0 * rows * width * hidden
        points.append((flops, 6 * flops / _slowest_s(products, repeats)))
    return {"latency_us": 0.0, "points": growing(points)}


def _slowest_s(call: Callable[[], object], repeats: int) -> float:
    """Of all ranks that start together, as a step goes on when the last one is there."""
    times_s = torch.tensor([0.0] * (repeats + 1), dtype=torch.float64)
    for repeat in range(repeats + 1):
        dist.barrier()
        times_s[repeat] = elapsed_s(call)
    dist.all_reduce(times_s, dist.ReduceOp.MAX)
    return statistics.median(times_s[1:].tolist())


def _rows(sizes: MoESizes, repeats: int) -> dict[str, Any]:
    """Bytes read and written by a gather -> bytes/s; what is read and written has left the core's own caches."""
    points = []
    for num_bytes in ROWS_BYTES:
        rows = num_bytes // (8 * sizes.d_model)
        order_R = torch.randperm(rows)
        cold = _cold(num_bytes, lambda: (torch.randn(rows, sizes.d_model), torch.empty(rows, sizes.d_model)))  # noqa: B023

        def gather() -> None:
            from_RM, to_RM = next(cold)  # noqa: B023
            torch.index_select(from_RM, 0, order_R, out=to_RM)  # noqa: B023

        points.append((float(num_bytes), num_bytes / median_s(gather, repeats)))
    return {"latency_us": 0.0, "points": growing(points)}


def _cold(num_bytes: int, make: Callable[[], Sequence[torch.Tensor]]) -> Iterator[Sequence[torch.Tensor]]:
    """Tensors of so many bytes in turns: when their turn comes again, others have taken their place in the caches."""
    return itertools.cycle([make() for _ in range(1 + COLD_BYTES // num_bytes)])


def _copies(repeats: int) -> dict[str, Any]:
    points = []
    for num_bytes in ROWS_BYTES:
        cold = _cold(
            2 * num_bytes,
            lambda: (torch.ones(num_bytes, dtype=torch.uint8), torch.zeros(num_bytes, dtype=torch.uint8)),  # noqa: B023
        )

        def copy() -> None:
            source, target = next(cold)  # noqa: B023
            target.copy_(source)

        points.append((float(num_bytes), num_bytes / median_s(copy, repeats)))
    return {"latency_us": 0.0, "points": growing(points)}


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
            spans = recorder.timeline().spans
            passes = [[span for span in spans if span.backward == backward] for backward in (False, True)]
            inside_us = sum(Timeline(tuple(own)).step_us for own in passes)
            outside_us = torch.tensor(whole_us - inside_us)
            dist.all_reduce(outside_us, dist.ReduceOp.MIN)  # others may have waited for the last
            found.append(float(outside_us))
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
        times_s.append(median_s(functools.partial(step, layer, *data), 3 * repeats))
        plan = plan_call("issuing", config, partition(((1,),), ((1,),), num_chunks=num_chunks))
        operations.append(len(plan.forward.ops) + len(plan.backward.ops))
    return max(0.0, 1e6 * (times_s[1] - times_s[0]) / (operations[1] - operations[0]))


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
