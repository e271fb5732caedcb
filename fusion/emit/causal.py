"""Rounds of a loop that a causal mask leaves nothing of, so that the loop need not turn for them.

Source: not in the paper, whose masks are added and skip nothing.
"""

from fusion.emit.tiles import At, Tiles
from fusion.plan.chain import Chain
from fusion.plan.stages import Causal, Elementwise, Softmax, operands
from fusion.plan.statements import product_of


def vanishing(chain: Chain, value: str) -> Causal | None:
    """The causal stage whose masked entries are zero in a value when products read it, if it has one.

    Args:
        chain: Any.
        value: Of a product.

    Returns:
        The stage, if a softmax or an exponent makes zeros of its -inf, and nothing later makes more of them; that of
        another value, if the value is multiplied by it.
    """
    found: Causal | None = None
    zero = False
    for stage in chain.epilogue(value):
        match stage:
            case Causal():
                found, zero = (stage if found is None else found), False
            case Softmax() | Elementwise(operation="exp_minus"):
                zero = found is not None and not zero
            case Elementwise(operation="add" | "mask"):
                zero = False
            case Elementwise(operation="mul", operand=str(other)) if found is None and other in _values(chain):
                found = vanishing(chain, other)
                zero = found is not None
            case _:
                pass
    return found if zero else None


def _values(chain: Chain) -> set[str]:
    return {product.out for product in chain.products}


def bounds(tiles: Tiles, sums: list[str], letter: str, known: str, at: At) -> tuple[str, str]:
    """First index and end of a loop over tiles, without rounds in which a causal mask leaves nothing.

    Args:
        tiles: Of the schedule.
        sums: Values that sum over the loop, and are all that it leaves behind.
        letter: Of the loop.
        known: Letters whose tile does not change in the loop.
        at: Where they are.

    Returns:
        The two expressions; 0 and the dimension's size where rounds may not be skipped.
    """
    found = {_bounds(tiles, value, letter, known, at) for value in sums}
    return found.pop() if len(found) == 1 else ("0", str(tiles.chain.sizes[letter]))


def _bounds(tiles: Tiles, value: str, letter: str, known: str, at: At) -> tuple[str, str]:
    chain, size = tiles.chain, tiles.chain.sizes[letter]
    values = [name for name in operands(product_of(chain, value)) if name not in {x.name for x in chain.inputs}]
    for mask in (vanishing(chain, name) for name in values):
        if mask is not None and mask.column == letter and mask.row in known:
            return "0", f"tl.minimum({size}, {at[mask.row]} + {tiles.sizes[mask.row] + mask.diagonal})"
        if mask is not None and mask.row == letter and mask.column in known:
            first = f"tl.maximum(0, {at[mask.column]} - {mask.diagonal})"
            return f"{first} // {tiles.sizes[letter]} * {tiles.sizes[letter]}", str(size)
    return "0", str(size)
