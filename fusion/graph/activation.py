"""Activations that are spelled out, such as x * sigmoid(x) or gelu's formula, told by the numbers that they give.

Source: our definition (the paper's front end is TVM's).
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg
from torch.nn import functional

from fusion.plan.stages import Activation

aten = torch.ops.aten

POINTWISE = frozenset(
    (
        aten.add.Tensor, aten.clamp.default, aten.clamp_min.default, aten.div.Tensor, aten.erf.default,
        aten.exp.default, aten.mul.Tensor, aten.neg.default, aten.pow.Tensor_Scalar, aten.reciprocal.default,
        aten.rsub.Scalar, aten.sigmoid.default, aten.sub.Tensor, aten.tanh.default,
    )
)  # fmt: skip
KNOWN: Mapping[Activation, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "relu": functional.relu,
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    }
)
MAX_NODES = 12  # of a formula
NEAR, FAR = 8.0, 1e5  # probes are dense between -NEAR and NEAR, and sparse from there to FAR
NUM_PROBES = 129
SAME = 1e-6  # constants are spelled with few digits; gelu and its approximation differ by 5e-4


def spelled_out(node: Node) -> tuple[Node, Activation, tuple[Node, ...]] | None:
    """The activation that a formula ends with.

    Args:
        node: Of a graph as `trace` makes it.

    Returns:
        What it is applied to, its name, and the nodes in between, which nothing else reads. None if it is none.
    """
    inside: list[Node] = []
    frontier = {node}
    while len(inside) < MAX_NODES:
        latest = max(frontier)
        if latest.target not in POINTWISE or any(user not in inside for user in latest.users if latest is not node):
            return None
        inside.append(latest)
        frontier = (frontier - {latest}) | set(latest.all_input_nodes)
        if len(frontier) == 1:
            (x,) = frontier
            name = _name(x, inside)
            if name is not None:
                return x, name, tuple(inside[1:])
    return None


def _name(x: Node, inside: list[Node]) -> Activation | None:
    if any(node.meta["val"].shape != x.meta["val"].shape for node in inside):
        return None
    probes = _probes()
    values: dict[Node, Any] = {x: probes}
    for node in reversed(inside):
        arguments, options = map_arg((node.args, dict(node.kwargs)), values.__getitem__)
        assert callable(node.target)
        values[node] = node.target(*arguments, **options)
    return _named(probes, values[inside[0]])


def activation_of(function: Callable[[Tensor], Tensor]) -> Activation | None:
    """The activation that a function is.

    Args:
        function: Any from a tensor to one of its shape.

    Returns:
        Its name; None if it is none that a chain has.
    """
    probes = _probes()
    with torch.no_grad():
        found = function(probes)
    return _named(probes, found) if isinstance(found, Tensor) and found.shape == probes.shape else None


def _probes() -> Tensor:
    near = torch.linspace(-NEAR, NEAR, NUM_PROBES, dtype=torch.float64)
    far = torch.logspace(math.log10(NEAR), math.log10(FAR), NUM_PROBES, dtype=torch.float64)
    return torch.cat((near, far, -far))


def _named(probes: Tensor, found: Tensor) -> Activation | None:
    errors = {name: float((known(probes) - found).abs().max()) for name, known in KNOWN.items()}
    return next((name for name, error in errors.items() if error < SAME and math.isfinite(error)), None)
