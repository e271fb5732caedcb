"""Executors by name, and for every chain of an operator's call what runs it.

Source: not in the paper.
"""

import functools
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusion.plan.chain import Chain
from fusion.plan.derived import GradientError
from fusion.plan.gradient import Gradients, gradients
from fusion.plan.interval import interval
from fusion.run.autograd import Execute, Execution, ExecutorFor
from fusion.run.check import DTYPES
from fusion.run.form import of_shapes, read_form
from fusion.run.planned import planned_executor

logger = logging.getLogger(__name__)

DEFAULT = "default"  # the executor that plans kernels for the tensors' device
MAX_CALLS = 4096  # kept: a chain with the sizes of its tensors


class Described(NamedTuple):
    """What of a tensor decides how a chain runs; hashed at every call."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Call:
    """A chain with its sizes and gradients, and what runs it."""

    chain: Chain
    plan: Gradients | None
    """None where no gradients are needed, or they are no chains."""
    execute: Execute | None
    """None is torch, product by product."""

    def named(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Tensors by the names of the inputs.

        Args:
            tensors: In their order.
        """
        return {tensor.name: value for tensor, value in zip(self.chain.inputs, tensors, strict=True)}


def wanted_names(chain: Chain, needs: str) -> frozenset[str]:
    """Names of the inputs that need a gradient.

    Args:
        chain: Whose inputs.
        needs: A digit for each input, 1 where it does.
    """
    return frozenset(tensor.name for tensor, need in zip(chain.inputs, needs, strict=True) if need == "1")


@functools.lru_cache(maxsize=MAX_CALLS)
def plan_of(form: str, needs: str) -> Gradients | None:
    """The gradients of a form; None where none are asked for, or they are no chains.

    Args:
        form: Of a chain.
        needs: A digit for each input, 1 where it needs one.
    """
    chain = read_form(form)
    wanted = wanted_names(chain, needs)
    try:
        return gradients(chain, wanted) if wanted else None
    except GradientError:
        return None


def check(chain: Chain, tensors: Sequence[Any]) -> None:
    """Check that tensors have the dtypes of a chain's inputs, and one device.

    Args:
        chain: Which.
        tensors: For every input, in its order, what has a dtype and a device.

    Raises:
        TypeError, ValueError: One has not; the message names the input.
    """
    first, boolean = tensors[0], chain.boolean_inputs
    for tensor, given in zip(chain.inputs, tensors, strict=True):
        dtype = torch.bool if tensor.name in boolean else DTYPES[chain.dtype]
        if given.dtype != dtype:
            raise TypeError(
                f"tensors[{tensor.name!r}] is {given.dtype}, not {dtype}; pass masks as torch.bool and the rest as "
                f"{DTYPES[chain.dtype]}"
            )
        if given.device != first.device:
            name = chain.inputs[0].name
            raise ValueError(
                f"tensors[{tensor.name!r}] is on {given.device}, {name!r} on {first.device}; use one device"
            )


@contextmanager
def by_itself(device: torch.device) -> Iterator[None]:
    """What torch does by itself: gradients inside of an operator too, no inference mode, no autocast.

    Args:
        device: Whose autocast is meant.
    """
    autograd = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    with torch.inference_mode(False), autograd, torch.autocast(device.type, enabled=False):
        yield


@functools.lru_cache(maxsize=MAX_CALLS)
def _work(form: str, shapes: tuple[torch.Size, ...]) -> tuple[Chain, float]:
    """The interval that tensors of some shapes are in, and the flops of the chain."""
    chain = of_shapes(form, shapes)
    return interval(chain), float(chain.flops)


class Executors:
    """Executors by name, and what they said of each chain; a process has one of it.

    Source: not in the paper.
    """

    def __init__(self) -> None:
        """The default one."""
        self._by_name: dict[str, ExecutorFor] = {DEFAULT: planned_executor()}
        self._patience_flops: dict[str, float] = {}
        self._waiting_flops: dict[tuple[str, Chain, str], float] = {}
        self._reasons: set[str] = set()
        self._lock = threading.RLock()
        self.call = functools.lru_cache(maxsize=MAX_CALLS)(self._call)

    def add(self, name: str, executor_for: ExecutorFor) -> None:
        """Name an executor, or another one instead of it, which is asked at once.

        Args:
            name: For calls of the operator.
            executor_for: Gives for a chain what runs it.
        """
        with self._lock:
            self._by_name[name] = executor_for
            self._patience_flops.pop(name, None)
            self.call.cache_clear()

    def be_patient(self, name: str, flops: float) -> None:
        """Ask an executor only of what is run often enough that looking for a kernel can pay.

        Training meets many sizes, most of them seldom, and a search for one takes as long as many of its steps.

        Args:
            name: Of the executor.
            flops: That torch computes, in all calls of the same interval, before the executor is asked; 0 asks at once.
        """
        with self._lock:
            self._patience_flops[name] = flops
            self._waiting_flops.clear()

    def is_due(self, form: str, needs: str, executor: str, shapes: Sequence[torch.Size]) -> bool:
        """Count a call, and say whether an executor is to be asked of the chain by now.

        Args:
            form: Of the chain.
            needs: A digit for each input, 1 where it needs a gradient: every one of those is searched for, too.
            executor: Its name.
            shapes: Of the inputs.
        """
        patience = self._patience_flops.get(executor, 0.0)
        if not patience:
            return True
        chain, flops = _work(form, tuple(shapes))
        key, kernels = (executor, chain, needs), 1 + needs.count("1")
        with self._lock:
            spent = self._waiting_flops.get(key, 0.0)
            self._waiting_flops[key] = spent + flops * kernels
        return spent >= patience * kernels

    def get(self, name: str) -> ExecutorFor:
        """The executor of a name.

        Args:
            name: As it was added.

        Raises:
            ValueError: There is none.
        """
        if name not in self._by_name:
            raise ValueError(f"executor={name!r}: known are {sorted(self._by_name)}; add it with executors.add first")
        return self._by_name[name]

    def ask(self, name: str, chain: Chain, needs: frozenset[str], device: torch.device) -> Execution | str:
        """What an executor says of a chain, asked by one thread at a time and outside of whatever the caller is in.

        Args:
            name: Of the executor.
            chain: With its sizes.
            needs: Names of the inputs that need a gradient.
            device: Where its tensors are.

        Raises:
            ValueError: There is no executor of this name.
        """
        with self._lock, by_itself(device):
            return self.get(name)(chain, needs, device)

    def renew_lock(self) -> None:
        """In a forked process nobody holds what another thread held."""
        self._lock = threading.RLock()

    def _call(self, form: str, needs: str, executor: str, tensors: tuple[Described, ...]) -> Call:
        chain = of_shapes(form, [tensor.shape for tensor in tensors])
        check(chain, tensors)
        wanted = wanted_names(chain, needs)
        plan = plan_of(form, needs)
        sized = gradients(chain, wanted) if plan is not None else None
        if 0 in chain.sizes.values():
            return Call(chain, sized, None)
        found = self.ask(executor, chain, wanted, tensors[0].device)
        if isinstance(found, Execution) and (sized is not None or not wanted):
            return Call(chain, sized, found.execute)
        self._say(f"{chain}: {found if isinstance(found, str) else 'its gradients are no chains'}; torch runs it")
        return Call(chain, sized, None)

    def _say(self, text: str) -> None:
        if text not in self._reasons:
            self._reasons.add(text)
            logger.info("%s", text)


executors = Executors()
os.register_at_fork(after_in_child=executors.renew_lock)
