"""Whether a chain's products can be made by a core's matrix unit (AMX), which multiplies tiles of bf16."""

from collections.abc import Mapping

from fusion.plan.chain import Chain
from fusion.plan.orientation import columns, roles
from fusion.plan.statements import product_of

DEPTH = 32  # entries of a tile along the sum
ROWS = 16  # of a tile
COLUMNS = 16
TILE_BYTES = 1024
TILE_CYCLES = 16  # of multiplying two tiles
SIDE = 2  # tiles of a block of sums, each way: they and their operands take all eight registers
FIRST_BYTES_PER_CYCLE, SECOND_BYTES_PER_CYCLE = 64, 32  # of a core's caches
FAR_BYTES_PER_CYCLE = 12  # of the cache that cores share
FIRST_BYTES = 24 << 10  # of the first cache, that operands may fill and stay
ALL_STAYS, NONE_STAYS = 0.25, 1.8  # of the second cache: tiles that fill no more stay in it, that fill more do not
OVERLAP = 0.7  # of reading and multiplying, the share of the shorter one that hides behind the other
ROUND_CYCLES = 5  # of rounding a tile's row of a left operand, or of copying it
ROUNDED_BYTES = DEPTH * (4 + 2)  # read and written by that


def suits(chain: Chain, tiles: Mapping[str, int], turning: str) -> bool:
    """Whether the unit takes all operands as they lie: left ones row by row, right ones packed, sums in whole tiles.

    Args:
        chain: What is computed.
        tiles: Letter of a loop -> tile size.
        turning: Letters whose tiles are several.

    Returns:
        Whether it does; else, and where a core has no such unit, products are made of fp32 vectors.

    Raises:
        OrientationError: No kernel of a CPU can be written for it.

    Source: not in the paper.
    """
    if chain.dtype != "bf16":
        return False
    column = columns(chain)
    values = {product.out for product in chain.products}
    along: dict[str, set[str]] = {}
    rights = set()
    for value in values:
        found, over = roles(chain, value, column), product_of(chain, value).over
        if over in turning and tiles[over] % DEPTH:
            return False
        along.setdefault(found.left, set()).add(over)
        rights.add(found.right)
    if rights & (values | along.keys()):
        return False
    return all(len(overs) == 1 and (name not in values or column[name] in overs) for name, overs in along.items())


def far_share(held_bytes: float, cache_bytes: float) -> float:
    """The share of what the unit reads and writes that lies behind a core's second cache.

    Args:
        held_bytes: Of all tiles that a block works on.
        cache_bytes: Of the second cache.

    Source: our measurement; caches are not filled in order, so the share grows with the tiles.
    """
    filled = held_bytes / cache_bytes
    return min(1.0, max(0.0, (filled - ALL_STAYS) / (NONE_STAYS - ALL_STAYS)))


def cycles(rows: int, cols: int, depth: int, far: float) -> float:
    """Cycles of a product of tiles by the unit, with the rounding of its left operand.

    Panels of columns turn outside, blocks of rows inside: a panel stays in the first cache if it has room there, and
    so does the left operand beside it.

    Args:
        rows: Of the left operand's tile.
        cols: Of the right one's.
        depth: Of the sum.
        far: Share of what is not in the first cache that is not in the second one either.

    Source: not in the paper.
    """
    down, across, steps = -(-rows // ROWS), -(-cols // COLUMNS), -(-depth // DEPTH)
    panels, blocks = -(-across // SIDE), -(-down // SIDE)
    panel_bytes, left_bytes = SIDE * steps * TILE_BYTES, down * steps * TILE_BYTES
    first, extra = 1 / FIRST_BYTES_PER_CYCLE, far * (1 / FAR_BYTES_PER_CYCLE - 1 / SECOND_BYTES_PER_CYCLE)
    second = 1 / SECOND_BYTES_PER_CYCLE + extra
    right_again = first if panel_bytes <= FIRST_BYTES else second
    left_again = first if left_bytes + panel_bytes <= FIRST_BYTES else second
    right = across * steps * TILE_BYTES * (second + (blocks - 1) * right_again)
    left = left_bytes * (second + (panels - 1) * left_again)
    sums = down * across * TILE_BYTES * second
    multiply = down * across * steps * TILE_CYCLES
    longer, shorter = max(multiply, left + right), min(multiply, left + right)
    rounding = rows * steps * (ROUND_CYCLES + ROUNDED_BYTES * extra)
    return longer + (1 - OVERLAP) * shorter + sums + rounding
