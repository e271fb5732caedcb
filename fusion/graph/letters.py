"""Which dimensions of a draft are loops and which are batches, and the letters that they get.

Every operand of a product has two loops: its own one and the sum's. What else it has is a batch.

Source: our definition (the paper's front end is TVM's).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from fusion.graph.axes import Axis
from fusion.graph.dimensions import Dimension, Tensors
from fusion.graph.draft import CutError, Draft, DraftProduct
from fusion.plan.verify import MAX_PRODUCTS

LOOPS = "MKNHPLJIFO"  # in the order of appearance: rows, sum and columns of the first product, then what is new
BATCHES = "ZGRQSUVWXYTABCDE"
OUTER_TO_INNER = "MNKHPLJIFO"


@dataclass(frozen=True)
class Letters:
    """A letter for each dimension."""

    of: dict[Dimension, str]
    """In the chain's order."""
    batch: str
    """Those that are batches."""


def letters(draft: Draft, found: Tensors, groups: list[Dimension]) -> Letters:
    """Choose loops and batches, and name them.

    Args:
        draft: Of a chain.
        found: Its tensors.
        groups: Its dimensions.

    Returns:
        The letters; those of the result come in its order.

    Raises:
        CutError: A product does not have two loops for each operand, or no loop runs through all products.
    """
    loops = _loops(draft, found, groups)
    _check_shared_loop(draft, found, loops)
    _check_number(draft)
    order = [group for axis in found.output for group in groups if group[0] == axis]
    order = [group for group in groups if group not in order and group[0] in found.axes[draft.output]] + order
    batches = [group for group in order if group not in loops]
    if len(batches) > len(BATCHES):
        raise CutError(draft.root, f"{len(batches)} batch dimensions: accepted are {len(BATCHES)}")
    of = dict(zip(loops, LOOPS, strict=False)) | dict(zip(batches, BATCHES, strict=False))
    rest = sorted((group for group in loops if group not in order), key=lambda group: OUTER_TO_INNER.index(of[group]))
    batch = "".join(of[group] for group in batches)
    return Letters({group: of[group] for group in (*order[:-1], *rest, order[-1])}, batch)


def _loops(draft: Draft, found: Tensors, groups: list[Dimension]) -> list[Dimension]:
    """Dimensions that are loops, in the order in which products bring them."""
    for product in reversed(draft.products):  # what is cut off late takes more with it
        _sum(draft, found, groups, product)
    chosen = {group for axes in found.pinned for group in groups if group[0] in axes}
    chosen |= {_sum(draft, found, groups, product) for product in draft.products}
    batches = {group for product in draft.products for group in groups if _is_shared(found, product, group)}
    ordered: dict[Dimension, None] = {}
    for product in draft.products:
        over = _sum(draft, found, groups, product)
        left, right = (found.axes[name] for name in product.names)
        free = [group for group in groups if group not in batches]
        rows, columns = (
            _own_loop(draft, product, [group for group in free if group[0] in own and group[0] not in other], chosen)
            for own, other in ((left, right), (right, left))
        )
        chosen |= {rows, columns}
        ordered |= dict.fromkeys((rows, over, columns))
    for product in draft.products:
        for axes in (found.axes[name] for name in product.names):
            if sum(group[0] in axes for group in ordered) != 2:
                raise _cut(draft, product, "more than two of its operand's dimensions are loops of the chain")
    if not chosen <= set(ordered):
        raise CutError(draft.root, "a stage needs a loop that no product has")
    return list(ordered)


def _sum(draft: Draft, found: Tensors, groups: list[Dimension], product: DraftProduct) -> Dimension:
    over = [group for group in groups if group[0] in found.sums[product.out]]
    if len(over) != 1:
        raise _cut(draft, product, f"it sums over {len(over)} dimensions that cannot be one")
    return over[0]


def _is_shared(found: Tensors, product: DraftProduct, dimension: Dimension) -> bool:
    """Whether a product repeats along a dimension."""
    in_both = all(dimension[0] in found.axes[name] for name in product.names)
    return in_both and dimension[0] not in found.sums[product.out]


def _own_loop(draft: Draft, product: DraftProduct, own: list[Dimension], chosen: set[Dimension]) -> Dimension:
    loops = [group for group in own if group in chosen]
    if len(loops) > 1 or not own:
        raise _cut(draft, product, f"its operand has {len(loops)} loops beside the sum's, not one")
    return loops[0] if loops else max(own[::-1], key=size)


def _check_shared_loop(draft: Draft, found: Tensors, loops: Iterable[Dimension]) -> None:
    """Blocks over tiles of a loop that all products have compute nothing twice; without one, they all would."""
    values = [product.out for product in draft.products]
    shared = {group: [x for x in values if group[0] in found.axes[x]] for group in loops}
    rows = max((group for group in shared if values[-1] in shared[group]), key=lambda group: len(shared[group]))
    apart = [value for value in values if value not in shared[rows]]
    if apart:
        node = draft.node_of(apart[0])
        reason = "has no loop that all other products have: every block would compute all of it"
        raise CutError(node, f"{node.name} {reason}")


def _check_number(draft: Draft) -> None:
    number, node = len(draft.products), draft.node_of(draft.products[0].out)
    if number > MAX_PRODUCTS:
        raise CutError(node, f"{number} products: a chain has at most {MAX_PRODUCTS}, so {node.name} is written out")


def _cut(draft: Draft, product: DraftProduct, reason: str) -> CutError:
    """Cut off an operand, a value first; or the product if its operands are inputs as they are."""
    reason = f"{product.node.name} cannot be one chain with what it reads: {reason}"
    operands = [(name, node) for name, node in zip(product.names, product.nodes, strict=True) if node is not None]
    for name, node in sorted(operands, key=lambda operand: operand[0] in draft.inputs):
        if name not in draft.inputs or draft.inputs[name].node is not node:
            return CutError(node, reason)
    return CutError(product.node, reason)


def size(dimension: Iterable[Axis]) -> int:
    """Entries along a dimension.

    Args:
        dimension: Its axes.
    """
    return math.prod(axis.size for axis in dimension)
