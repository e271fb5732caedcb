"""What runs each chain of a graph: a chain that nothing runs is tried again without its first product.

Source: our definition (MCFuser, arXiv:2506.22169, fuses every chain that it finds).
"""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule

from fusion.graph.bind import Match
from fusion.graph.find import Decline, Found, find
from fusion.run.autograd import Execution


@dataclass(frozen=True)
class Choice:
    """The chains that run as one kernel, and what does not with reasons."""

    found: Found
    executions: Mapping[str, Execution]
    """Node that a chain ends at -> what runs it."""

    def __str__(self) -> str:
        how = [f"{match.output} runs as: {self.executions[match.output].text}" for match in self.found.matches]
        return "\n".join([str(self.found), *how])


def choose(
    graph_module: GraphModule,
    execution_for: Callable[[Match], Execution | str],
    differentiated: Container[str] = (),
) -> Choice:
    """Find the chains of a graph that something runs.

    Args:
        graph_module: As `trace` makes it.
        execution_for: Gives for a chain what runs it, or the reason why nothing does.
        differentiated: Names of nodes whose tensors need a gradient.

    Returns:
        The choice.
    """
    apart: dict[str, str] = {}
    refused: dict[str, str] = {}
    known: dict[Any, Execution | str] = {}
    while True:
        found = find(graph_module, apart, differentiated)
        executions: dict[str, Execution] = {}
        for match in found.matches:
            key = match.output, match.chain, match.bindings
            if key not in known:
                known[key] = execution_for(match)
            outcome = known[key]
            if isinstance(outcome, Execution):
                executions[match.output] = outcome
            elif match.intermediates:
                apart[match.intermediates[0]] = outcome
                break
            else:
                refused[match.output] = outcome
        else:
            matches = tuple(match for match in found.matches if match.output in executions)
            declines = tuple(Decline(node, reason) for node, reason in refused.items() if node not in executions)
            return Choice(Found(matches, (*found.declines, *declines)), executions)
