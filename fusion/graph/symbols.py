"""Graphs with symbolic sizes: chains are found at sizes that cannot coincide, and put back with the symbols.

Every symbol becomes a prime of its own that divides no number among the sizes. What is found then holds for all sizes:
two are only equal, and one only divides another, where that follows from the symbols.

Source: our definition (MCFuser, arXiv:2506.22169, has fixed sizes).
"""

import itertools
import math
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node


class Symbols:
    """The symbols among a graph's sizes.

    Source: our definition.
    """

    def __init__(self, graph_module: GraphModule) -> None:
        """Give each a prime.

        Args:
            graph_module: As `fusion.graph.trace` makes it, but with symbols among the sizes; its symbols are arguments.
        """
        self._nodes: dict[int, Node] = {}
        self._primes: dict[Any, int] = {}
        self._hints: dict[int, int] = {}
        numbers = _numbers(graph_module)
        for node in graph_module.graph.find_nodes(op="placeholder"):
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt) and value.node.expr.is_symbol and value.node.has_hint():
                prime = next(
                    p for p in _primes(value.node.hint) if p not in self._nodes and all(n % p for n in numbers)
                )
                self._primes[value.node.expr] = prime
                self._nodes[prime], self._hints[prime] = node, value.node.hint

    def concrete(self, graph_module: GraphModule) -> GraphModule:
        """The same graph with numbers as sizes, to find chains in.

        Args:
            graph_module: With the symbols.
        """
        if not self._primes:
            return graph_module
        graph = Graph()
        copies: dict[Node, Node] = {}
        graph.output(graph.graph_copy(graph_module.graph, copies))
        with FakeTensorMode():
            for node, copy in copies.items():
                value = node.meta.get("val")
                copy.name, copy.meta = node.name, {**node.meta, "val": self._concrete(value)}
                if isinstance(value, Tensor) and copy.meta["val"] is None:
                    copy.meta["symbolic"] = list(value.shape)
        return GraphModule(graph_module, graph)

    def hint(self, size: int) -> int:
        """The size at which the graph was traced.

        Args:
            size: One of the concrete graph.
        """
        number, primes = self._factors(size)
        return number * math.prod(self._hints[prime] for prime in primes)

    def nodes(self, graph: Graph, size: int, copies: Mapping[Node, Node]) -> Any:
        """A size as nodes of a graph; where it has no symbols it is a number.

        Args:
            graph: Which gets the nodes where it inserts at present.
            size: One of the concrete graph.
            copies: From the nodes of the graph with symbols to those of this one.
        """
        number, primes = self._factors(size)
        found: Any = number
        for prime in primes:
            node = copies[self._nodes[prime]]
            found = node if isinstance(found, int) and found == 1 else graph.call_function(operator.mul, (found, node))
        return found

    def _factors(self, size: int) -> tuple[int, list[int]]:
        found = []
        for prime in self._nodes:
            while size and size % prime == 0:
                size //= prime
                found.append(prime)
        return size, found

    def _concrete(self, value: Any) -> Any:
        if isinstance(value, torch.SymInt):
            return self._number(value)
        if isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter):
            numbers = [self._number(size) for size in (*value.shape, *value.stride())]
            known = [number for number in numbers if number is not None]
            if len(known) < len(numbers):
                return None  # then no stage of a chain
            sizes, strides = known[: value.ndim], known[value.ndim :]
            return torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)
        return [self._concrete(part) for part in value] if isinstance(value, list | tuple) else value

    def _number(self, size: Any) -> int | None:
        """A size at the primes, if it is a product of symbols and a number there."""
        if not isinstance(size, torch.SymInt):
            return int(size)
        number = size.node.expr.xreplace(self._primes)
        if not isinstance(number, int) and not number.is_Integer:
            return None
        rest, primes = self._factors(int(number))
        product = rest * math.prod(symbol for prime in primes for symbol in self._symbols(prime))
        return int(number) if product == size.node.expr else None

    def _symbols(self, prime: int) -> list[Any]:
        return [symbol for symbol, own in self._primes.items() if own == prime]


def _numbers(graph_module: GraphModule) -> set[int]:
    """The numbers that are sizes, or by which symbols are multiplied in sizes; beside 0 and 1."""
    found = set()
    for node in graph_module.graph.nodes:
        value = node.meta.get("val")
        sizes: tuple[Any, ...] = tuple(value.shape) if isinstance(value, Tensor) else ()
        for size in sizes:
            found.add(int(size.node.expr.as_coeff_Mul()[0] if isinstance(size, torch.SymInt) else size))
    return found - {0, 1}


def _primes(least: int) -> Iterator[int]:
    """Primes in order; where sizes are compared, theirs are about as the true ones."""
    for number in itertools.count(max(least, 2)):
        if all(number % divisor for divisor in range(2, math.isqrt(number) + 1)):
            yield number
