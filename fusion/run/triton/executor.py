"""What runs a chain: planned on a device file once, kept in the cache, launched as a Triton kernel with its gradients.

Source: MCFuser (arXiv:2506.22169), which plans when a model is compiled; gradients are not in the paper.
"""

import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusion.emit.triton import Kernel, emit
from fusion.plan.chain import Chain
from fusion.plan.derived import GradientError
from fusion.plan.device import Device, device_names, load_device
from fusion.plan.footprint import pipeline, shared_bytes
from fusion.plan.gradient import gradients
from fusion.plan.intensity import intensity
from fusion.plan.partition import after_first, alone
from fusion.plan.search import search
from fusion.plan.space import SpaceError, search_space
from fusion.plan.stages import Softmax
from fusion.plan.traffic import traffic, unfused_bytes
from fusion.run.autograd import Execution, ExecutorFor
from fusion.run.cache import Cache
from fusion.run.triton.launch import launch, launch_with_lse
from fusion.run.winner import Key, Winner

LEAST_US = 2.5  # assumed: what a kernel takes at least when it is started again and again, which the model leaves out
INTERPRETED = "a100"  # what is planned for where Triton's interpreter runs kernels and no device is named


def triton_executor(device: str | Path | None = None, cache_folder: str | Path | None = None) -> ExecutorFor:
    """Run chains that are worth it as Triton kernels.

    Args:
        device: What to plan for, as `load_device` takes it; None is the device of the tensors.
        cache_folder: Where winners are kept; None is `default_folder()`.

    Returns:
        The function; it refuses chains that are compute-bound, have no candidate that fits or no gradients.

    Raises:
        DeviceError: There is no such device.
    """
    named = None if device is None else load_device(device)
    planners: dict[Device, Planner] = {}

    def executor_for(chain: Chain, needs: frozenset[str], where: torch.device) -> Execution | str:
        facts = _device(named, where)
        if isinstance(facts, str):
            return facts
        planner = planners.setdefault(facts, Planner(facts, Cache(cache_folder)))
        return planner.execution(chain, needs)

    return executor_for


class Planner:
    """The chains of one device, each planned once in this process."""

    def __init__(self, device: Device, cache: Cache) -> None:
        """Nothing planned yet.

        Args:
            device: What to plan for.
            cache: Where winners are kept between processes.
        """
        self.device, self.cache = device, cache
        self._winners: dict[Chain, Winner] = {}
        self._kernels: dict[tuple[Chain, bool, bool], Kernel] = {}

    def execution(self, chain: Chain, needs: frozenset[str]) -> Execution | str:
        """How a chain runs, or why it does not.

        Args:
            chain: What to run.
            needs: Names of the inputs that need a gradient.
        """
        if len(chain.products) == 1:
            return "one product: nothing to keep on chip"
        verdict = intensity(chain, self.device)
        if not verdict.is_mbci:
            return str(verdict)
        try:
            winner = self.winner(chain)
            for other in gradients(chain, needs).chains if needs else ():
                self.winner(other)
        except (GradientError, SpaceError) as error:
            return str(error)
        fused_us, apart_us = self.fused_us(chain), self.apart_us(chain)
        first = chain.products[0].out
        if fused_us >= apart_us:
            return f"predicted {fused_us:.4g} us as one kernel, {apart_us:.4g} us with {first} written out"
        plan = winner.schedule
        moved, unfused = traffic(chain, plan.program(chain), dict(plan.tiles)).bytes, unfused_bytes(chain)
        text = (
            f"{plan}; predicted {fused_us:.4g} us, {apart_us:.4g} us with {first} written out; moves "
            f"{moved:,} bytes, saves {unfused - moved:,} of {unfused:,}; {verdict}"
        )
        return Execution(self, text)

    def winner(self, chain: Chain) -> Winner:
        """The schedule of a chain: known, from the cache, or searched for.

        Args:
            chain: Any.

        Raises:
            SpaceError: No candidate fits the device.
        """
        if chain not in self._winners:
            key = Key.of(chain, self.device.name)
            winner = self.cache.load(key)
            if winner is None:
                near = self.cache.nearest(key)
                start = [] if near is None else [near.schedule]
                space = search_space(chain, self.device)
                best = search(space, pipeline=pipeline, shared_bytes=shared_bytes, start=start).best
                winner = Winner(best.schedule, best.predicted.total_us)
                self.cache.store(key, winner)
            self._winners[chain] = winner
        return self._winners[chain]

    def fused_us(self, chain: Chain) -> float:
        """The time that is predicted of a chain as one kernel.

        Args:
            chain: Any.
        """
        return max(self.winner(chain).predicted_us, LEAST_US)

    def apart_us(self, chain: Chain) -> float:
        """The least time that is predicted if the first value is written out and read again.

        Args:
            chain: Any; stages between products cost nothing there, but for a softmax, which passes over its value.
        """
        first, *others = (product.out for product in chain.products)
        passes = [stage for stage in chain.epilogue(first) if isinstance(stage, Softmax)]
        pass_us = max(2e6 * chain.num_bytes(first) / self.device.dram_bytes_per_s, LEAST_US)
        time_us = self.fused_us(alone(chain, first)) + pass_us * len(passes)
        if not others:
            return time_us
        rest = after_first(chain)
        together_us = self.fused_us(rest) if len(others) > 1 else math.inf
        return time_us + min(together_us, self.apart_us(rest))

    def __call__(
        self, chain: Chain, tensors: Mapping[str, Tensor], *, exact: bool = False, save_lse: bool = False
    ) -> Any:
        key = chain, exact, save_lse
        if key not in self._kernels:
            upcast = chain.dtype == "bf16" and not next(iter(tensors.values())).is_cuda
            plan = self.winner(chain).schedule
            self._kernels[key] = emit(chain, plan, exact=exact, save_lse=save_lse, upcast=upcast)
        kernel = self._kernels[key]
        return launch_with_lse(kernel, chain, tensors) if save_lse else launch(kernel, chain, tensors)


def _device(named: Device | None, where: torch.device) -> Device | str:
    """What to plan for, or why nothing runs there."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    from triton import knobs

    if where.type == "cuda":
        found = torch.cuda.get_device_name(where)
        fitting = [name for name in device_names() if name in found.lower().replace(" ", "")]
        if named is None and not fitting:
            return f"{found} has no device file: pass device=, one of {device_names()} or a file of your own"
        return named or load_device(fitting[0])
    if knobs.runtime.interpret:
        return named or load_device(INTERPRETED)
    return f"there is no kernel for tensors on {where}: move them to a GPU, or set TRITON_INTERPRET=1 to try one slowly"
