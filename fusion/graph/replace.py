"""Putting chains back: the same graph with one call in place of each chain.

Source: our definition (the paper's front end is TVM's).
"""

from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from fusion.graph.bind import Match
from fusion.graph.find import Found

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
    """Replace chains by calls.

    Args:
        graph_module: As `trace` makes it; it stays as it is.
        found: Its chains.
        kernel_for: Gives for each chain what runs it.

    Returns:
        A module that computes the same; it shares the parameters and constants of the other.
    """
    graph = Graph()
    copies: dict[Node, Node] = {}
    graph.output(graph.graph_copy(graph_module.graph, copies))
    module = GraphModule(graph_module, graph)
    nodes = {node.name: copies[node] for node in graph_module.graph.nodes if node in copies}
    for number, match in enumerate(found.matches):
        module.add_submodule(f"chain_{number}", ChainCall(match, kernel_for(match)))
        end = nodes[match.output]
        with graph.inserting_before(end):
            call = graph.call_module(f"chain_{number}", tuple(nodes[binding.node] for binding in match.bindings))
        call.meta = dict(end.meta)
        end.replace_all_uses_with(call)
        nodes[match.output] = call
    graph.eliminate_dead_code()
    module.recompile()
    return module
