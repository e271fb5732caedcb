"""Runs a function on several gloo ranks of this machine and brings every rank's failure back."""

import datetime
import os
import tempfile
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from scripts.testbed.ranks import leave

TIMEOUT = datetime.timedelta(seconds=60)


def _main(rank: int, world_size: int, store: str, function: Callable[..., None], arguments: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=TIMEOUT)
    try:
        function(rank, world_size, *arguments)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    leave()


def run_ranks(world_size: int, function: Callable[..., None], *arguments: object) -> None:
    """Call `function(rank, world_size, *arguments)` on `world_size` gloo ranks; a failing rank fails the caller.

    `function` must be importable in a fresh process: a module-level function of an installed or test module.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_main, (world_size, os.path.join(folder, "store"), function, arguments), nprocs=world_size, join=True)
