"""fuse: a function whose chains of matrix products run as one kernel each, and which says what it fuses and why.

For each signature (shapes, strides, dtypes, devices of tensors, and all other arguments) the function is traced once,
its chains are found and planned, and what cannot be fused runs as it was.
"""

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fusion.graph import Kernel, Match, Trace, choose, replace, trace
from fusion.graph.outside import outside_tensors
from fusion.plan.chain import Chain
from fusion.run.autograd import Execution, ExecutorFor, apply
from fusion.run.executors import by_itself
from fusion.run.planned import planned_executor


def fuse(
    function: Callable[..., Any] | None = None,
    *,
    device: str | Path | None = None,
    cache_folder: str | Path | None = None,
    executor_for: ExecutorFor | None = None,
) -> Any:
    """Fuse the chains of a function, of a module, or of a method; also as a decorator, with or without arguments.

    The function must be a fixed sequence of torch operations for each signature. Modules and tensors that it names are
    followed: when a parameter is another tensor, the function is traced anew. What it reaches in other ways, such as a
    module in a list, is taken as it is at first.

    Args:
        function: What to fuse. A module's own method may be fused in place: `m.forward = fuse(m.forward)`.
        device: What to plan for, as `fusion.plan.device.load_device` takes it; None is what the tensors are on.
        cache_folder: Where winners are kept between runs; None is `fusion.run.cache.default_folder()`.
        executor_for: Gives for a chain what runs it, or the reason why nothing does; None plans kernels for the device
            that the tensors are on: C++ on a CPU, Triton on a GPU.

    Returns:
        A `Fused`: called as the function is, with the same results but for the order of sums, and zeros where a softmax
        over nothing but -inf gives nan. Without a function, a decorator.

    Raises:
        DeviceError: There is no such device.

    Source: not in the paper, which fuses when a model is compiled.
    """
    if function is None:
        return functools.partial(fuse, device=device, cache_folder=cache_folder, executor_for=executor_for)
    return Fused(function, executor_for or planned_executor(device, cache_folder))


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What a signature runs: a graph with calls of chains, or without any the function itself."""

    traced: Trace
    module: torch.fx.GraphModule | None
    text: str


class Fused:
    """A function with its plans, one for each signature.

    Source: not in the paper.
    """

    def __init__(self, function: Callable[..., Any], executor_for: ExecutorFor) -> None:
        """Trace nothing yet.

        Args:
            function: What to fuse.
            executor_for: Gives for a chain what runs it.
        """
        functools.update_wrapper(self, function)
        self._function, self._executor_for = function, executor_for
        self._plans: dict[Any, _Plan] = {}

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        plan = self._plan(leaves, spec, args, kwargs)
        if plan.module is None:
            return self._function(*args, **kwargs)
        return plan.traced.result(plan.module(*(leaf for leaf in leaves if isinstance(leaf, Tensor))))

    def explain(self, *args: Any, **kwargs: Any) -> str:
        """What a call with these arguments fuses: chains, how they run and what that saves, and reasons for the rest.

        Args:
            *args: As of a call.
            **kwargs: As of a call.

        Raises:
            TraceError: The function is no fixed sequence of operations.
        """
        leaves, spec = pytree.tree_flatten((args, kwargs))
        return self._plan(leaves, spec, args, kwargs).text

    def _plan(self, leaves: list[Any], spec: pytree.TreeSpec, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Plan:
        key = self._signature(leaves, spec)
        if key not in self._plans:
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            self._plans[key] = _planned(trace(self._function, args, kwargs), tensors, self._executor_for)
        return self._plans[key]

    def _signature(self, leaves: list[Any], spec: pytree.TreeSpec) -> Any:
        outside = outside_tensors(self._function, leaves)
        for position, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor) and type(leaf).__hash__ is None:
                raise TypeError(
                    f"argument {position} of the flattened call is a {type(leaf).__name__}, which cannot be told from "
                    "another; accepted are tensors and hashable values in tuples, lists and dicts"
                )
        kinds = {tensor.device.type for tensor in (*leaves, *outside) if isinstance(tensor, Tensor)}
        return (
            spec,
            tuple(_described(leaf) if isinstance(leaf, Tensor) else (type(leaf), leaf) for leaf in leaves),
            tuple((id(tensor), _described(tensor)) for tensor in outside),
            torch.is_grad_enabled(),
            tuple(sorted(kind for kind in kinds if torch.is_autocast_enabled(kind))),
        )


def _described(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def _planned(traced: Trace, tensors: Sequence[Tensor], executor_for: ExecutorFor) -> _Plan:
    differentiated = traced.needs_gradient(tensors) if torch.is_grad_enabled() else frozenset()
    values = (node.meta.get("val") for node in traced.graph_module.graph.nodes)
    device = next((value.device for value in values if isinstance(value, Tensor)), torch.device("cpu"))

    @functools.cache
    def asked(chain: Chain, needs: frozenset[str]) -> Execution | str:
        with by_itself(device):
            return executor_for(chain, needs, device)

    def execution_for(match: Match) -> Execution | str:
        return asked(match.chain, match.needs(differentiated))

    choice = choose(traced.graph_module, execution_for, differentiated)

    def kernel_for(match: Match) -> Kernel:
        return lambda tensors: apply(match.chain, tensors, choice.executions[match.output].execute)

    matches = choice.found.matches
    module = replace(traced.graph_module, choice.found, kernel_for) if matches else None
    return _Plan(traced, module, str(choice))
