"""Finding chains: each as long as it can be, from the last product of a graph to the first.

A chain may begin anew where it cannot go on, so every product is in at most one. What is not fused says why.

Source: our definition (the paper's front end is TVM's, and how it partitions a graph is not in our sources).
"""

from collections.abc import Collection, Container, Iterator, Mapping
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from fusion.graph.bind import Match, bind
from fusion.graph.draft import CutError
from fusion.graph.products import PRODUCTS, Attention, Product
from fusion.graph.reader import read
from fusion.graph.uses import Uses, barrier
from fusion.plan.gradient import is_passed_on


@dataclass(frozen=True)
class Decline:
    """A node that is not fused with what is before or behind it, and why."""

    node: str
    reason: str

    def __str__(self) -> str:
        return f"{self.node}: {self.reason}"


@dataclass(frozen=True)
class Found:
    """The chains of a graph, the last one first, and what is not fused."""

    matches: tuple[Match, ...]
    declines: tuple[Decline, ...]

    def __str__(self) -> str:
        lines = [f"chain at {match}" for match in self.matches] or ["no chain"]
        return "\n".join([*lines, *(f"not fused: {decline}" for decline in self.declines)])


def find(
    graph_module: GraphModule, apart: Mapping[str, str] | None = None, differentiated: Container[str] = ()
) -> Found:
    """Find the chains of a graph.

    Args:
        graph_module: As `trace` makes it.
        apart: Names of nodes that must be written out -> why.
        differentiated: Names of nodes whose tensors need a gradient. A product by itself then ends where a gradient
            needs its value: kept, it is not computed again.

    Returns:
        Chains, those of one product with what stands behind it among them, and the reasons for the rest.
    """
    nodes = list(graph_module.graph.nodes)
    reasons = apart or {}
    search = _Search(nodes, {node: reasons[node.name] for node in nodes if node.name in reasons}, differentiated)
    for node in reversed(nodes):
        search.product(node)
    return Found(tuple(search.matches), tuple(dict.fromkeys(search.declines)))


class _Search:
    def __init__(self, nodes: list[Node], apart: dict[Node, str], differentiated: Container[str]) -> None:
        self.uses, self.apart, self.differentiated = Uses(nodes), apart, differentiated
        self.matches: list[Match] = []
        self.declines = [Decline(node.name, reason) for node, reason in apart.items()]
        self.taken: set[str] = set()
        self.read: set[str] = set()
        self.barriers = [node for node in nodes if barrier(node)]

    def product(self, node: Node) -> None:
        """Find the longest chain that a product is the last of, unless it is in one already."""
        operation = self.uses.operations[node]
        if node.target in PRODUCTS and isinstance(operation, str):
            self.declines.append(Decline(node.name, operation))
        if not isinstance(operation, Product | Attention) or node.name in self.taken:
            return
        found: tuple[Match, dict[Node, str]] | None = None
        reason = ""
        for root in self.ends(node):
            try:
                found = self.chain(root, node)
            except CutError as error:
                reason = error.reason
                continue
            if root is node or not self.is_better_kept(found[0]):
                break
        if found is None:
            self.declines.append(Decline(node.name, reason))
            return
        match, cuts = found
        inputs = {binding.node for binding in match.bindings}
        self.declines += self.limits([node for node in node.graph.nodes if node.name in inputs], cuts)
        self.matches.append(match)
        self.taken |= set(match.covered)
        self.read |= {binding.node for binding in match.bindings}

    def is_better_kept(self, match: Match) -> bool:
        """Whether a product by itself would be computed again for the gradient of a stage behind it."""
        chain = match.chain
        alone = len(chain.products) == 1 and bool(match.needs(self.differentiated))
        return alone and not all(map(is_passed_on, chain.epilogue(chain.output)))

    def ends(self, node: Node) -> Iterator[Node]:
        """Where a chain with this last product may end, the farthest first."""
        path = [node]
        while True:
            readers = self.uses.readers(path[-1])
            operation = self.uses.operations[readers[0]] if len(readers) == 1 else ""
            if isinstance(operation, str | Product | Attention) or readers[0].name in self.taken:
                return iter(path[::-1])
            path.append(readers[0])

    def chain(self, root: Node, product: Node) -> tuple[Match, dict[Node, str]]:
        """The chain that ends at a node and has a product in it, with what had to be cut off."""
        cuts: dict[Node, str] = {}
        while True:
            try:
                draft = read(self.uses, {*cuts, *self.apart}, root)
                if product not in draft.covered:
                    raise CutError(root, f"{product.name} is not what changes there")
                self.check_readers(draft.covered, root)
                return bind(draft), cuts
            except CutError as error:
                if error.node is root or error.node in cuts:
                    raise CutError(root, error.reason) from error
                cuts[error.node] = error.reason

    def check_readers(self, covered: Collection[Node], root: Node) -> None:
        """Nothing outside may need what a chain keeps on chip."""
        for node in covered:
            if self.uses.sections[node] != self.uses.sections[root]:
                between = self.barriers[self.uses.sections[root] - 1]
                raise CutError(node, f"{between.name} stands between {node.name} and {root.name}: {barrier(between)}")
            if node is not root:
                others = [user for user in node.users if user not in covered]
                if others:
                    raise CutError(node, f"{node.name} is read by {others[0].name} too, so it must be written out")
                if node.name in self.read | self.taken:
                    raise CutError(node, f"{node.name} is an input of another chain, so it must be written out")

    def limits(self, inputs: list[Node], cuts: dict[Node, str]) -> Iterator[Decline]:
        """Why a chain does not go on behind its inputs, where products lie behind them."""
        pending, seen = inputs[::-1], set[Node]()
        while pending:
            node = pending.pop()
            operation = self.uses.operations[node]
            if node in seen or node.op != "call_function":
                continue
            seen.add(node)
            if cuts.get(node):
                yield Decline(node.name, cuts[node])
            elif isinstance(operation, str):
                if any(self.uses.depths[source] for source in node.all_input_nodes):
                    yield Decline(node.name, operation)
            elif self.uses.depths[node] and self.uses.outside(node):
                yield Decline(node.name, self.uses.outside(node))
            elif not isinstance(operation, Product | Attention):
                pending += node.all_input_nodes
