"""Who reads a node, whether it must be written out for that, and how many products lie behind it.

Source: our definition (the paper's front end is TVM's).
"""

import operator
from collections.abc import Iterator, Sequence

import torch
from torch.fx import Node

from fusion.graph.operations import Activate, Combine, Operation, recognize
from fusion.graph.products import Attention, Product


class Uses:
    """What the nodes of a graph are in chains, and who reads them."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        """Look at every node once.

        Args:
            nodes: Of a graph as `trace` makes it, in its order.
        """
        self.operations: dict[Node, Operation | str] = {node: recognize(node) for node in nodes}
        """For every node what it is in a chain, or why it is no stage of one."""
        self.depths: dict[Node, int] = {}
        """For every node the most products, one behind the other, of a chain that ends there."""
        spelled = (found for found in self.operations.values() if isinstance(found, Activate))
        self.sections = dict(_sections(nodes))
        """For every node how many barriers came before it: nothing moves from one section to another."""
        self._inside = {inner: found.x for found in spelled for inner in found.inside}
        for node in nodes:
            self.depths[node] = self._depth(node)

    def readers(self, node: Node) -> list[Node]:
        """The nodes that read a node; those inside an activation that is spelled out do not count.

        Args:
            node: Any.
        """
        return [user for user in node.users if self._inside.get(user) is not node]

    def outside(self, node: Node) -> str:
        """Why a node must be written out, as far as its readers tell.

        Args:
            node: Any.

        Returns:
            The reason, empty where every reader may be a stage of a chain.
        """
        for reader in self.readers(node):
            if reader.op == "output":
                return f"{node.name} is also returned, so it must be written out: return only what comes last"
            if isinstance(self.operations[reader], str):
                return f"{node.name} is read by {reader.name} ({reader.target}), so it must be written out"
        return ""

    def _depth(self, node: Node) -> int:
        match self.operations[node]:
            case Product(left=left, right=right):
                return 1 + max(self._before(left), self._before(right))
            case Attention(query=query, key=key, value=value):
                return 1 + max(1 + self._before(query), 1 + self._before(key), self._before(value))
            case Combine(first=first, second=second):
                return max(self._before(first), self._before(second))
            case str():
                return 0
            case operation:
                return self._before(operation.x)

    def _before(self, node: Node) -> int:
        return 0 if self.outside(node) else self.depths[node]


def barrier(node: Node) -> str:
    """Why what stands before a node and what stands behind it must not change places.

    Args:
        node: Of a graph as `trace` makes it.

    Returns:
        The reason, empty where there is none.
    """
    if node.op != "call_function" or node.target is operator.getitem:
        return ""
    if isinstance(node.target, torch._ops.OpOverload):
        is_mutable = node.target._schema.is_mutable
        return f"{node.target} writes into a tensor: write x = x + y in place of x += y" if is_mutable else ""
    if node.target is torch._C._set_grad_enabled:
        return "torch.no_grad() or enable_grad() begins or ends"
    name = getattr(node.target, "__name__", node.target)
    return f"{name} changes how torch computes: cast tensors instead"


def _sections(nodes: Sequence[Node]) -> Iterator[tuple[Node, int]]:
    section = 0
    for node in nodes:
        section += bool(barrier(node))
        yield node, section
