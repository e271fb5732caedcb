"""Putting chains back: the same graph with one call in place of each chain, of a module or of the operator.

Source: our definition (the paper's front end is TVM's).
"""

import operator
from collections.abc import Callable, Container, Mapping

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from fusion.graph.bind import Match, Views
from fusion.graph.find import Found
from fusion.graph.symbols import Symbols
from fusion.run.form import form_of
from fusion.run.operator import needs_text

aten = torch.ops.aten

Kernel = Callable[[Mapping[str, Tensor]], Tensor]
"""A chain's tensors by name -> its output; differentiable where gradients are asked for."""


class ChainCall(nn.Module):
    """A chain on the tensors of a graph."""

    def __init__(self, match: Match, kernel: Kernel) -> None:
        """Of a match and what runs its chain."""
        super().__init__()
        self.match, self.kernel = match, kernel

    def forward(self, *tensors: Tensor) -> Tensor:
        """Run the chain.

        Args:
            *tensors: Of the nodes that the match is bound to, in their order.

        Returns:
            The tensor of the node that it ends at.
        """
        named = {}
        for binding, tensor in zip(self.match.bindings, tensors, strict=True):
            view = binding.views(tensor)
            named[binding.name] = view.logical_not() if binding.inverted else view
        return self.match.views(self.kernel(named).contiguous())

    def extra_repr(self) -> str:
        return str(self.match.chain)


def replace(graph_module: GraphModule, found: Found, kernel_for: Callable[[Match], Kernel]) -> GraphModule:
    """Replace chains by calls of modules.

    Args:
        graph_module: As `trace` makes it; it stays as it is.
        found: Its chains.
        kernel_for: Gives for each chain what runs it.

    Returns:
        A module that computes the same; it shares the parameters and constants of the other.
    """

    def call(module: GraphModule, match: Match, nodes: Mapping[str, Node]) -> Node:
        name = f"chain_{found.matches.index(match)}"
        module.add_submodule(name, ChainCall(match, kernel_for(match)))
        return module.graph.call_module(name, tuple(nodes[binding.node] for binding in match.bindings))

    return _replaced(graph_module, found, call)


def replace_by_operator(
    graph_module: GraphModule, found: Found, symbols: Symbols, executor: str, differentiated: Container[str]
) -> GraphModule:
    """Replace chains by calls of the operator, with what shows tensors in another way as operations beside it.

    Args:
        graph_module: As `trace` makes it, with symbols among its sizes or without; it stays as it is.
        found: The chains of `symbols.concrete(graph_module)`.
        symbols: Of the graph.
        executor: Name of what runs the chains.
        differentiated: Names of the nodes whose tensors need a gradient.

    Returns:
        A module that computes the same.
    """

    def call(module: GraphModule, match: Match, nodes: Mapping[str, Node]) -> Node:
        graph = module.graph
        placeholders = {node: nodes[node.name] for node in graph_module.graph.find_nodes(op="placeholder")}

        def viewed(node: Node, views: Views) -> Node:
            split, shape = (
                [symbols.nodes(graph, size, placeholders) for size in sizes] for sizes in (views.split, views.shape)
            )
            node = graph.call_function(aten.reshape.default, (node, split))
            if views.order != tuple(range(len(views.order))):
                node = graph.call_function(aten.permute.default, (node, list(views.order)))
            return graph.call_function(aten.reshape.default, (node, shape))

        tensors = []
        for binding in match.bindings:
            tensor = viewed(nodes[binding.node], binding.views)
            tensors.append(graph.call_function(aten.logical_not.default, (tensor,)) if binding.inverted else tensor)
        needs = needs_text(match.chain, match.needs(differentiated))
        arguments = (tensors, form_of(match.chain), needs, executor)
        results = graph.call_function(torch.ops.mcfuser.chain.default, arguments)
        return viewed(graph.call_function(operator.getitem, (results, 0)), match.views)

    return _replaced(graph_module, found, call)


def _replaced(
    graph_module: GraphModule, found: Found, call: Callable[[GraphModule, Match, Mapping[str, Node]], Node]
) -> GraphModule:
    graph = Graph()
    copies: dict[Node, Node] = {}
    graph.output(graph.graph_copy(graph_module.graph, copies))
    module = GraphModule(graph_module, graph)
    nodes = {node.name: copies[node] for node in graph_module.graph.nodes if node in copies}
    for match in found.matches:
        end = nodes[match.output]
        with module.graph.inserting_before(end):
            called = call(module, match, nodes)
        called.meta = dict(end.meta)
        end.replace_all_uses_with(called)
        nodes[match.output] = called
    module.graph.eliminate_dead_code()
    module.recompile()
    return module
