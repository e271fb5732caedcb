"""Right operands that a product does not read as they lie: they are packed, vectors of columns after each other.

One that is read once or twice is packed by who reads it, panel by panel, right before: the panel is still in a near
cache when it is read, and nothing of it is written to memory. One that many blocks read is packed once, before all.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fusion.plan.chain import Chain
from fusion.plan.orientation import columns, roles
from fusion.plan.placement import Program
from fusion.plan.statements import product_of
from fusion.plan.traffic import repeats

MAX_DIRECT_COLUMNS = 128  # wider rows lie far apart: those of a tile meet in few sets of the caches
MAX_READ = 2  # times that all of an operand is packed anew for its reader


@dataclass(frozen=True)
class Packing:
    """How a right operand is read.

    Source: not in the paper, which leaves a tile's place to Triton.
    """

    column: str
    """Letter of its vectors."""
    over: str
    """The letter that its product sums over."""
    again: tuple[str, ...]
    """For each of its readers the letters of the loops around it that do not index the operand."""

    def times_read(self, rounds: Mapping[str, int]) -> int:
        """How often all of it is read.

        Args:
            rounds: Letter of a loop or of the batch -> how often it turns.
        """
        return sum(math.prod(rounds[letter] for letter in letters) for letters in self.again)

    def by_panel(self, rounds: Mapping[str, int]) -> bool:
        """Whether its readers pack it.

        Args:
            rounds: Letter of a loop or of the batch -> how often it turns.
        """
        return self.times_read(rounds) <= MAX_READ


def packed_operands(chain: Chain, program: Program) -> dict[str, Packing]:
    """The inputs that have to be packed.

    Args:
        chain: What is computed.
        program: Where its products stand.

    Returns:
        Name of the input -> how it is read.

    Raises:
        OrientationError: No kernel of a CPU can be written for it.

    Source: not in the paper.
    """
    column = columns(chain)
    around = {found.statement.tensor: found.around for found in repeats(chain, program) if found.statement.kind == "C"}
    packed: dict[str, Packing] = {}
    for product in chain.products:
        name, own = roles(chain, product.out, column).right, column[product.out]
        if name in around or not _needs_packing(chain, name, own):
            continue
        again = "".join(letter for letter in around[product.out] if letter not in chain.tensors[name])
        before = packed[name].again if name in packed else ()
        packed[name] = Packing(own, product_of(chain, product.out).over, (*before, again))
    return packed


def _needs_packing(chain: Chain, name: str, column: str) -> bool:
    return chain.dtype != "fp32" or chain.tensors[name][-1] != column or chain.sizes[column] > MAX_DIRECT_COLUMNS
