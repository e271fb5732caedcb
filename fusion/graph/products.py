"""The products of a graph: which dimensions of their operands they sum over, and what else they do.

Source: our definition (the paper's front end is TVM's).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from string import ascii_uppercase
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import Node

from fusion.graph.constants import number
from fusion.graph.views import shape

aten = torch.ops.aten
BATCH = ascii_uppercase  # labels of leading dimensions


@dataclass(frozen=True)
class Product:
    """A product of two tensors, their dimensions labelled as einsum does, times a number, plus a tensor."""

    left: Node
    right: Node
    labels: tuple[str, str, str]
    scale: float = 1.0
    addend: Node | None = None

    @property
    def summed(self) -> str:
        """Labels that both operands have and the result has not."""
        left, right, out = self.labels
        return "".join(label for label in left if label in right and label not in out)


@dataclass(frozen=True)
class Attention:
    """softmax(query key^T scale + masks) value, with the heads of key and value repeated if `grouped`."""

    query: Node
    key: Node
    value: Node
    mask: Node | None
    causal: bool
    scale: float
    grouped: bool


def _argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _mm(node: Node) -> Product | Attention | str:
    left, right = node.args[:2]
    assert isinstance(left, Node) and isinstance(right, Node)  # noqa: PT018
    return Product(left, right, ("amk", "akn", "amn") if node.target is aten.bmm.default else ("mk", "kn", "mn"))


def _matmul(node: Node) -> Product | Attention | str:
    left, right = node.args[:2]
    assert isinstance(left, Node) and isinstance(right, Node)  # noqa: PT018
    dims = len(shape(left)), len(shape(right))
    lead = BATCH[: max(*dims, 2) - 2]
    rows, columns = ("m" if dims[0] > 1 else ""), ("n" if dims[1] > 1 else "")
    if not rows or not columns:
        return "a product with a vector is no matrix product: give the vector a dimension of size 1"
    own = (lead[len(lead) - (dim - 2) :] if dim > 2 else "" for dim in dims)
    left_lead, right_lead = own
    return Product(left, right, (f"{left_lead}mk", f"{right_lead}kn", f"{lead}mn"))


def _linear(node: Node) -> Product | Attention | str:
    x, weight = node.args[:2]
    assert isinstance(x, Node) and isinstance(weight, Node)  # noqa: PT018
    lead = BATCH[: max(len(shape(x)) - 2, 0)]
    if len(shape(x)) < 2 or len(shape(weight)) != 2:
        return "linear of a vector is no matrix product: give the vector a dimension of size 1"
    return Product(x, weight, (f"{lead}mk", "nk", f"{lead}mn"), addend=_argument(node, 2, "bias"))


def _addmm(node: Node) -> Product | Attention | str:
    addend, left, right = node.args[:3]
    assert isinstance(left, Node) and isinstance(right, Node)  # noqa: PT018
    beta, alpha = (number(node.kwargs.get(name, 1)) for name in ("beta", "alpha"))
    if beta not in (0.0, 1.0) or alpha is None:
        return f"{node.target} with beta={beta}: scale what is added beforehand"
    labels = ("amk", "akn", "amn") if node.target is aten.baddbmm.default else ("mk", "kn", "mn")
    return Product(left, right, labels, alpha, addend if beta and isinstance(addend, Node) else None)


def _einsum(node: Node) -> Product | Attention | str:
    equation, tensors = node.args[:2]
    assert isinstance(equation, str)
    assert isinstance(tensors, list | tuple)
    left_right, arrow, out = equation.replace(" ", "").partition("->")
    operands = left_right.split(",")
    if len(operands) != 2:
        return f"einsum {equation!r} has {len(operands)} operands: write products of two"
    if not arrow:
        every = "".join(operands)
        out = "".join(sorted(label for label in set(every) if every.count(label) == 1))
    left, right = operands
    if "." in equation or any(len(set(labels)) != len(labels) for labels in (left, right, out)):
        return f"einsum {equation!r}: write it without dots and diagonals"
    alone = (set(left) ^ set(right)) - set(out)
    if alone or not set(left) & set(right) - set(out):
        return f"einsum {equation!r} is no matrix product: sum over labels of both operands, and only over those"
    a, b = tensors
    assert isinstance(a, Node) and isinstance(b, Node)  # noqa: PT018
    return Product(a, b, (left, right, out))


def _attention(node: Node) -> Product | Attention | str:
    query, key, value = node.args[:3]
    assert isinstance(query, Node) and isinstance(key, Node) and isinstance(value, Node)  # noqa: PT018
    if _argument(node, 4, "dropout_p", 0.0):
        return "dropout between the products: set dropout_p=0 or call eval()"
    if len(shape(query)) < 3 and len(shape(query)) != 2:
        return f"operation {node.target} on tensors of {len(shape(query))} dimensions"
    scale = node.kwargs.get("scale")
    scale = max(shape(query)[-1], 1) ** -0.5 if scale is None else number(scale)
    if scale is None or not math.isfinite(scale):
        return f"{node.target}: its scale is no finite number"
    mask, causal = _argument(node, 3, "attn_mask"), bool(_argument(node, 5, "is_causal", False))
    return Attention(query, key, value, mask, causal, scale, bool(node.kwargs.get("enable_gqa", False)))


PRODUCTS: Mapping[Any, Callable[[Node], Product | Attention | str]] = MappingProxyType(
    {
        aten.mm.default: _mm,
        aten.bmm.default: _mm,
        aten.matmul.default: _matmul,
        aten.linear.default: _linear,
        aten.addmm.default: _addmm,
        aten.baddbmm.default: _addmm,
        aten.einsum.default: _einsum,
        aten.scaled_dot_product_attention.default: _attention,
    }
)
"""Target -> what a node of it is as a product, or why it is none that a chain can have."""
