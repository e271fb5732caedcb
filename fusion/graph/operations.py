"""What an operation of a graph is in a chain: a product, a stage, a view, or nothing with a reason.

The level is that of `trace`: linear, matmul, einsum, softmax and attention are still whole.

Source: our definition (the paper's front end is TVM's).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import Node

from fusion.graph.activation import spelled_out
from fusion.graph.constants import number
from fusion.graph.products import PRODUCTS, Attention, Product
from fusion.graph.views import drops, shape, viewed
from fusion.plan.stages import Activation

aten = torch.ops.aten


@dataclass(frozen=True)
class Numeric:
    """A tensor changed by numbers, one after the other: ("mul" | "add", number)."""

    x: Node
    steps: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Combine:
    """Two tensors added, multiplied or subtracted: "add", "mul" or "sub"."""

    kind: str
    first: Node
    second: Node


@dataclass(frozen=True)
class Activate:
    """An activation; `inside` are the nodes of one that is spelled out, but for the last."""

    x: Node
    activation: Activation
    inside: tuple[Node, ...] = ()


@dataclass(frozen=True)
class Mask:
    """-inf where a boolean tensor is not `keeps`."""

    x: Node
    mask: Node
    keeps: bool


@dataclass(frozen=True)
class Normalize:
    """A softmax over one dimension."""

    x: Node
    dim: int


@dataclass(frozen=True)
class View:
    """The same entries, or a cast of them."""

    x: Node


Operation = Product | Attention | Numeric | Combine | Activate | Mask | Normalize | View
_Recognizer = Callable[[Node], Operation | str]


def recognize(node: Node) -> Operation | str:
    """What a node is in a chain.

    Args:
        node: Of a graph as `trace` makes it.

    Returns:
        Its operation, or the reason why it is no stage of a chain.
    """
    if node.op != "call_function":
        return f"{node.name} comes from outside"
    for tensor in (node, *node.all_input_nodes):
        value = tensor.meta.get("val")
        if "symbolic" in tensor.meta:
            return f"symbolic size: {tensor.name} is {tensor.meta['symbolic']}, accepted are products of symbols"
        if type(value) is int and tensor is not node:
            continue  # a size that a view is given
        if not isinstance(value, torch.Tensor):
            return f"operation {node.target} is no stage of a chain"
        if not all(type(size) is int for size in value.shape):
            return f"symbolic size: {tensor.name} is {list(value.shape)}; trace with fixed sizes"
    source = viewed(node)
    if source is not None:
        return View(source)
    activation = spelled_out(node)
    if activation is not None:
        return Activate(*activation)
    return _RECOGNIZERS[node.target](node) if node.target in _RECOGNIZERS else _unknown(node)


def _unknown(node: Node) -> str:
    name = str(node.target)
    if node.target in (aten.sigmoid.default, aten.tanh.default):
        return f"activation {name} is none of relu, gelu, silu"
    return f"operation {name} is no stage of a chain"


def _numeric_or_combine(node: Node) -> Operation | str:
    """add, sub, rsub, mul, div of a tensor with a number or a tensor."""
    kind = str(node.target).split(".")[1]
    first, second = node.args[:2]
    if kind == "rsub":
        first, second, kind = second, first, "sub"
    alpha = node.args[2] if len(node.args) > 2 else node.kwargs.get("alpha", 1)  # of rsub.Scalar it has a position
    factor = number(alpha) if kind in ("add", "sub") else 1.0
    if factor is None:
        return f"{node.target} with an alpha that is no number: multiply beforehand"
    for x, other, swapped in ((first, second, False), (second, first, True)):
        value = number(other)
        if isinstance(x, Node) and value is not None:
            return _numeric(node, kind, x, value, factor, swapped=swapped)
    if kind == "div" or factor != 1.0 or not isinstance(first, Node) or not isinstance(second, Node):
        return f"{node.target} of two tensors: multiply or add instead, scaled beforehand"
    return Combine(kind, first, second)


def _numeric(node: Node, kind: str, x: Node, value: float, alpha: float, *, swapped: bool) -> Operation | str:
    """`x kind value`, or `value kind x` if swapped; alpha belongs to the second one."""
    tensor_factor, number_factor = (alpha, 1.0) if swapped else (1.0, alpha)
    match kind:
        case "mul":
            steps = [("mul", value)]
        case "div" if not swapped and value:
            steps = [("mul", 1 / value)]
        case "add":
            steps = [("mul", tensor_factor), ("add", number_factor * value)]
        case "sub" if swapped:
            steps = [("mul", -tensor_factor), ("add", value)]
        case "sub":
            steps = [("add", -number_factor * value)]
        case _:
            return f"{node.target} by a tensor or by zero: multiply instead"
    if not all(math.isfinite(step) for _, step in steps):
        return f"{node.target} with {value}: use a boolean mask and -inf to leave entries out"
    if shape(x) != shape(node):
        return f"{node.target} changes the shape of {x.name}"
    return Numeric(x, tuple(step for step in steps if step not in (("mul", 1.0), ("add", 0.0))))


def _negate(node: Node) -> Operation | str:
    x = node.args[0]
    assert isinstance(x, Node)
    return Numeric(x, (("mul", -1.0),))


def _activate(node: Node) -> Operation | str:
    x = node.args[0]
    assert isinstance(x, Node)
    if node.target is aten.gelu.default:
        return Activate(x, "gelu_tanh" if node.kwargs.get("approximate", "none") == "tanh" else "gelu")
    return Activate(x, "relu" if node.target is aten.relu.default else "silu")


def _masked_fill(node: Node) -> Operation | str:
    x, mask, fill = node.args[:3]
    assert isinstance(x, Node) and isinstance(mask, Node)  # noqa: PT018
    return _mask(node, x, mask, number(fill), keeps=False)


def _where(node: Node) -> Operation | str:
    if len(node.args) != 3:
        return f"operation {node.target} with one argument is no stage of a chain"
    mask, first, second = node.args
    assert isinstance(mask, Node)
    for x, fill, keeps in ((first, number(second), True), (second, number(first), False)):
        if isinstance(x, Node) and fill is not None:
            return _mask(node, x, mask, fill, keeps=keeps)
    return f"{node.target} between two tensors: only -inf in place of entries is a stage of a chain"


def _mask(node: Node, x: Node, mask: Node, fill: float | None, *, keeps: bool) -> Operation | str:
    if fill != -math.inf:
        return f"{node.target} with {fill}: fill with -inf, which a softmax leaves out exactly"
    if shape(x) != shape(node):
        return f"{node.target} changes the shape of {x.name}: expand it first"
    return Mask(x, mask, keeps)


def _softmax(node: Node) -> Operation | str:
    x, dim = node.args[:2]
    assert isinstance(x, Node)
    assert isinstance(dim, int)
    return Normalize(x, dim % max(len(shape(x)), 1))


def _dropout(node: Node) -> Operation | str:
    assert drops(node)
    return "dropout between the products: set p=0 or call eval()"


_RECOGNIZERS: MappingProxyType[Any, _Recognizer] = MappingProxyType(
    {
        **PRODUCTS,
        aten.add.Tensor: _numeric_or_combine,
        aten.add.Scalar: _numeric_or_combine,
        aten.sub.Tensor: _numeric_or_combine,
        aten.sub.Scalar: _numeric_or_combine,
        aten.rsub.Tensor: _numeric_or_combine,
        aten.rsub.Scalar: _numeric_or_combine,
        aten.mul.Tensor: _numeric_or_combine,
        aten.mul.Scalar: _numeric_or_combine,
        aten.div.Tensor: _numeric_or_combine,
        aten.div.Scalar: _numeric_or_combine,
        aten.neg.default: _negate,
        aten.relu.default: _activate,
        aten.gelu.default: _activate,
        aten.silu.default: _activate,
        aten.masked_fill.Scalar: _masked_fill,
        aten.masked_fill.Tensor: _masked_fill,
        aten.where.self: _where,
        aten.where.ScalarOther: _where,
        aten.where.ScalarSelf: _where,
        aten.softmax.int: _softmax,
        aten._softmax.default: _softmax,
        aten.special_softmax.default: _softmax,
        aten.dropout.default: _dropout,
    }
)
