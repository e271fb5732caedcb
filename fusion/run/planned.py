"""The executor that plans kernels for the device that tensors are on: C++ on a CPU, Triton on a GPU.

Source: not in the paper.
"""

import importlib.util
from pathlib import Path

import torch

from fusion.plan.chain import Chain
from fusion.plan.device import load_device
from fusion.run.autograd import Execution, ExecutorFor
from fusion.run.cpp.executor import cpp_executor
from fusion.run.triton.executor import triton_executor


def planned_executor(
    device: str | Path | None = None, cache_folder: str | Path | None = None, compiled: int | None = None
) -> ExecutorFor:
    """Run chains that are worth it as kernels, whatever device their tensors are on.

    Args:
        device: What to plan for, as `load_device` takes it; None is the device of the tensors.
        cache_folder: Where winners are kept; None is `default_folder()`.
        compiled: How many candidates of a search on a CPU are compiled and measured: fewer are planned sooner, more
            may run faster; None is fusion.run.cpp.executor.COMPILED.

    Returns:
        The function. With TRITON_INTERPRET=1 in the environment kernels for tensors on a CPU are Triton's too.

    Raises:
        DeviceError: There is no such device.
    """
    kind = None if device is None else load_device(device).kind
    native = cpp_executor(device if kind == "cpu" else None, cache_folder, compiled)
    triton = triton_executor(device if kind != "cpu" else None, cache_folder)

    def executor_for(chain: Chain, needs: frozenset[str], where: torch.device) -> Execution | str:
        is_native = where.type == "cpu" and kind in (None, "cpu") and not (kind is None and _is_interpreted())
        return (native if is_native else triton)(chain, needs, where)

    return executor_for


def _is_interpreted() -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)
