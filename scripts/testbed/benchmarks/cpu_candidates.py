"""Candidates of a chain on this CPU, compiled and measured: what a search chooses from."""

import functools
import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from fusion import Chain
from fusion.emit.cpp.kernel import Kernel, emit
from fusion.plan.cpu_model import best_micro
from fusion.plan.device import Device
from fusion.plan.orientation import OrientationError
from fusion.plan.schedule import Schedule
from fusion.plan.space import search_space
from fusion.run.cache import Cache
from fusion.run.cpp.build import target
from fusion.run.cpp.calibrate import this_cpu
from fusion.run.cpp.executor import CpuPlanner, measure_us
from fusion.run.cpp.native import compile_together
from fusion.run.cpp.proof import draw_tensors
from scripts.testbed.benchmarks.fusion_estimates import draw

logger = logging.getLogger(__name__)

TOGETHER = 8  # kernels that are compiled as one file


def planner(threads: int, cache: Cache, compiled: int | None = None) -> CpuPlanner:
    """What plans chains on this machine.

    Args:
        threads: That kernels run with.
        cache: Of winners.
        compiled: How many candidates of a search are compiled and measured; None leaves it to the library.
    """
    torch.set_num_threads(threads)
    return CpuPlanner(this_cpu(), threads, cache, compiled)


def drawn(chain: Chain, device: Device, number: int, *, seed: int) -> list[Schedule]:
    """Schedules from all of the space, each as likely as any other, with the register block that the model gives them.

    Args:
        chain: What is computed.
        device: On which.
        number: How many are drawn; the same one may come twice, and then counts once.
        seed: Of the choice.
    """
    found = draw(search_space(chain, device), number, seed=seed)
    return list(dict.fromkeys(replace(each, micro=best_micro(chain, each, device)) for each in found))


def measured_us(chain: Chain, schedules: Sequence[Schedule], threads: int) -> dict[Schedule, float]:
    """What kernels take; what cannot be written as a kernel is left out.

    Args:
        chain: What they compute.
        schedules: How.
        threads: That they run with.
    """
    kernels: dict[Schedule, Kernel] = {}
    for schedule in schedules:
        try:
            kernels[schedule] = emit(chain, schedule, suffix=f"_{len(kernels)}")
        except OrientationError as error:
            logger.info("no kernel of %s: %s", schedule, error)
    listed, compiled = list(kernels.values()), []
    for start in range(0, len(listed), TOGETHER):
        compiled += compile_together(listed[start : start + TOGETHER], target())
    tensors = draw_tensors(chain)
    with torch.no_grad():
        times_us = measure_us([functools.partial(kernel, chain, tensors) for kernel in compiled], threads)
    return dict(zip(kernels, times_us, strict=True))
