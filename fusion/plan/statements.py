"""The statements of a chain and the graph of what each depends on, before any loop is chosen.

A statement works on one tile of one tensor: load L_A, compute C_C (one step of a product's sum), finish F_C (the stages
that change a complete value in place) and store S_E. It has to stand inside the loops that index its tile (scope), and
after the statements that make what it reads (order).

Source: MCFuser (arXiv:2506.22169), Figures 4 and 5; F, and anything between the products, are not in the paper.
"""

from dataclasses import dataclass
from typing import Literal

from fusion.plan.chain import Chain
from fusion.plan.stages import MatMul, operands


@dataclass(frozen=True)
class Statement:
    """One kind of work on one tensor's tile.

    Source: MCFuser (arXiv:2506.22169), Figure 4.
    """

    kind: Literal["L", "C", "F", "S"]
    tensor: str

    def __str__(self) -> str:
        return f"{self.kind}_{self.tensor}"


@dataclass(frozen=True)
class Node:
    """A statement with what it depends on.

    Source: MCFuser (arXiv:2506.22169), Figure 5.
    """

    statement: Statement
    scope: str
    """Loops that index its tile, in the chain's order."""
    after: tuple[Statement, ...] = ()
    """Statements whose results it reads."""


def dependence_graph(chain: Chain) -> tuple[Node, ...]:
    """All statements of a chain in the order of data flow, loads right before their first reader.

    Args:
        chain: Any.

    Returns:
        For each product its loads and its compute; if stages follow it, their loads and its finish before its first
        reader; last the store.

    Source: MCFuser (arXiv:2506.22169), Figure 5.
    """
    nodes: dict[Statement, Node] = {}
    tensors = chain.tensors

    def add(statement: Statement, letters: str, reads: tuple[str, ...], after: tuple[Statement, ...] = ()) -> None:
        for name in reads:
            make(name)
        scope = "".join(letter for letter in chain.loops if letter in letters)
        nodes[statement] = Node(statement, scope, after + tuple(ready(chain, name) for name in reads))

    def make(name: str) -> None:
        """Load an input, or finish a value, as late as its first reader allows."""
        statement = ready(chain, name)
        if statement.kind == "F" and statement not in nodes:
            add(statement, tensors[name], epilogue_operands(chain, name), (Statement("C", name),))
        elif statement.kind == "L" and statement not in nodes:
            add(statement, tensors[name], ())

    for product in chain.products:
        add(Statement("C", product.out), tensors[product.out] + product.over, operands(product))
    add(Statement("S", chain.output), tensors[chain.output], (chain.output,))
    return tuple(nodes.values())


def epilogue_operands(chain: Chain, value: str) -> tuple[str, ...]:
    """Names of the tensors that a value's epilogue reads, each once.

    Args:
        chain: Any.
        value: Of a product.

    Source: not in the paper, which has no stages between products.
    """
    return tuple(dict.fromkeys(name for stage in chain.epilogue(value) for name in operands(stage)))


def ready(chain: Chain, tensor: str) -> Statement:
    """The statement after which a tensor's tile may be read.

    Args:
        chain: Any.
        tensor: One of its inputs or values.

    Source: not in the paper, which has no stages between products.
    """
    if all(product.out != tensor for product in chain.products):
        return Statement("L", tensor)
    return Statement("F" if chain.epilogue(tensor) else "C", tensor)


def pending_sums(chain: Chain, value: str) -> str:
    """Letters that the values which a product or its finish reads are summed over, directly or further back.

    Args:
        chain: Any.
        value: Of a product.

    Returns:
        Loops that have to be over before the statements of `value` may run, but for those that its own product has.

    Source: not in the paper, which draws the complete sum as an order edge.
    """
    products = {product.out: product for product in chain.products}
    read = operands(products[value]) + epilogue_operands(chain, value)
    letters = "".join(products[name].over + pending_sums(chain, name) for name in read if name in products)
    own = chain.tensors[value] + products[value].over
    return "".join(letter for letter in chain.loops if letter in letters and letter not in own)


def touches(chain: Chain, statement: Statement) -> tuple[str, ...]:
    """The tensors that a statement reads or changes.

    Args:
        chain: Any.
        statement: One of its statements.

    Source: MCFuser (arXiv:2506.22169), Figure 5.
    """
    match statement.kind:
        case "C":
            return (statement.tensor, *operands(product_of(chain, statement.tensor)))
        case "F":
            return (statement.tensor, *epilogue_operands(chain, statement.tensor))
        case _:
            return (statement.tensor,)


def uses(chain: Chain, value: str) -> frozenset[Statement]:
    """The statements that read a value, finish it or store it.

    Args:
        chain: Any.
        value: Of a product.

    Source: MCFuser (arXiv:2506.22169), Figure 5: its order edges.
    """
    found = {Statement("C", product.out) for product in chain.products if value in operands(product)}
    found |= {Statement("F", p.out) for p in chain.products if value in epilogue_operands(chain, p.out)}
    found |= {Statement("F", value)} if chain.epilogue(value) else set()
    return frozenset(found | ({Statement("S", value)} if value == chain.output else set()))


def product_of(chain: Chain, value: str) -> MatMul:
    """The product that makes a value.

    Args:
        chain: Any.
        value: Its name.

    Source: MCFuser (arXiv:2506.22169), Figure 3.
    """
    return next(product for product in chain.products if product.out == value)
