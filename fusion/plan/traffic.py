"""The bytes that a program moves and the flops that it does, exactly, statement by statement.

Tiles at an edge are cut: a loop that indexes a tensor visits all of it once, however the tiles fall, so a statement
moves the tensor's bytes once for each round of the loops around it, grid and batch included, that do not index it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from fusion.plan.chain import Chain
from fusion.plan.expression import Expression
from fusion.plan.placement import Program, grid_loops, place
from fusion.plan.schedule import Schedule
from fusion.plan.stages import Softmax, operands
from fusion.plan.statements import Statement, product_of


@dataclass(frozen=True)
class Repeats:
    """How often a statement runs, as letters: true of all tiles under which the same loops turn.

    Source: MCFuser (arXiv:2506.22169), analytical performance model: its LP_set with the grid and the batch.
    """

    statement: Statement
    around: str
    """Letters of all loops around it: the batch's, the grid's and its own."""
    again: str
    """Those of them that do not index its tile, so that it works on the same entries again."""


@dataclass(frozen=True)
class Moved:
    """What a load or store moves in all of its rounds.

    Source: MCFuser (arXiv:2506.22169), analytical performance model: TS_X times the rounds of LP_set.
    """

    statement: Statement
    trips: int
    bytes: int


@dataclass(frozen=True)
class Computed:
    """What the compute of a product does in all of its rounds.

    Source: MCFuser (arXiv:2506.22169), analytical performance model: Fp_X times the rounds of LP_set.
    """

    statement: Statement
    trips: int
    flops: int
    """Of entries that exist, those computed again included."""
    padded_flops: int
    """Of whole tiles, those at an edge too."""


@dataclass(frozen=True)
class Traffic:
    """All that a program moves and does.

    Source: MCFuser (arXiv:2506.22169), analytical performance model.
    """

    moved: tuple[Moved, ...]
    computed: tuple[Computed, ...]

    @property
    def bytes(self) -> int:
        """Loaded and stored."""
        return sum(statement.bytes for statement in self.moved)

    @property
    def flops(self) -> int:
        """Of entries that exist."""
        return sum(statement.flops for statement in self.computed)

    @property
    def padded_flops(self) -> int:
        """Of whole tiles."""
        return sum(statement.padded_flops for statement in self.computed)


def traffic(chain: Chain, program: Program, tiles: Mapping[str, int]) -> Traffic:
    """What a program moves and does.

    Args:
        chain: What it computes.
        program: Where its statements stand.
        tiles: Letter -> tile size of every loop.

    Returns:
        Bytes of every load and store, flops of every compute, in program order.

    Source: MCFuser (arXiv:2506.22169), analytical performance model; that tiles at an edge move less is ours.
    """
    sizes, moved, computed = chain.sizes, [], []
    rounds = rounds_of(chain, tiles)
    for found in repeats(chain, program):
        statement = found.statement
        trips, again = (math.prod(rounds[letter] for letter in letters) for letters in (found.around, found.again))
        if statement.kind in "LS":
            moved.append(Moved(statement, trips, chain.num_bytes(statement.tensor) * again))
        elif statement.kind == "C":
            letters = compute_letters(chain, statement.tensor)
            flops = 2 * math.prod(sizes[letter] for letter in letters) * again
            tile = 2 * math.prod(tiles[letter] for letter in letters if letter in tiles)
            computed.append(Computed(statement, trips, flops, tile * trips))
    return Traffic(tuple(moved), tuple(computed))


def rounds_of(chain: Chain, tiles: Mapping[str, int]) -> dict[str, int]:
    """How often each loop turns, the batch's too.

    Args:
        chain: Any.
        tiles: Letter -> tile size of every loop.

    Source: MCFuser (arXiv:2506.22169), analytical performance model: the rounds of LP_set.
    """
    found = {letter: chain.sizes[letter] for letter in chain.batch}
    return found | {letter: -(-max(chain.sizes[letter], 1) // tiles[letter]) for letter in chain.loops}


def skeleton(chain: Chain, expression: Expression, turning: str) -> Program:
    """The program of an expression while just some loops turn: the same for all tiles that leave them several rounds.

    Args:
        chain: What is computed.
        expression: One of its tiling expressions.
        turning: Letters of the loops with more than one round.

    Returns:
        The program; the loops that turn have two rounds.

    Source: MCFuser (arXiv:2506.22169), Figures 4 and 5: statements and dead loops depend on no more than that.
    """
    dims = tuple(replace(dim, size=2 if dim.name in turning else 1) for dim in chain.dims)
    tiles = dict.fromkeys(chain.loops, 1)
    return place(replace(chain, dims=dims), expression, tiles, grid=grid_loops(chain, expression))


def repeats(chain: Chain, program: Program) -> tuple[Repeats, ...]:
    """The loops around every statement of a program, in program order.

    Args:
        chain: What it computes.
        program: Where its statements stand.

    Source: MCFuser (arXiv:2506.22169), analytical performance model: LP_set.
    """
    outside = chain.batch + "".join(letter for letter, _ in program.grid)
    tensors, found = chain.tensors, []
    for statement, loops in program.walk():
        own = compute_letters(chain, statement.tensor) if statement.kind == "C" else tensors[statement.tensor]
        around = outside + "".join(loop.letter for loop in loops)
        found.append(Repeats(statement, around, "".join(letter for letter in around if letter not in own)))
    return tuple(found)


def compute_letters(chain: Chain, value: str) -> str:
    """Letters of a product's multiplications: those of its value, the batch's too, and the one that it sums over.

    Args:
        chain: Any.
        value: Of a product.

    Source: MCFuser (arXiv:2506.22169), Figure 3.
    """
    return chain.tensors[value] + product_of(chain, value).over


def naive_program(chain: Chain, schedule: Schedule) -> Program:
    """A schedule without the paper's placement, as in Chimera: loads and stores in the loops of their products.

    Args:
        chain: What is computed.
        schedule: Its expression and tiles.

    Returns:
        The program, with the same loops spread over blocks.

    Source: MCFuser (arXiv:2506.22169), Figure 4, the placement that it starts from.
    """
    grid = grid_loops(chain, schedule.expression)
    return place(chain, schedule.expression, dict(schedule.tiles), grid=grid, hoist=False)


def unfused_bytes(chain: Chain) -> int:
    """The least that a chain moves with one kernel for each product and one for each softmax.

    Args:
        chain: Any.

    Returns:
        Bytes if a product's kernel reads each of its operands once, applies all stages up to a softmax on the way and
        writes its value once; and a softmax, with the stages behind it, reads and writes the value once more.

    Source: our definition (the paper compares with libraries). It favours the unfused side, which cannot do better with
        a softmax: no tile of a product holds the whole of a long row.
    """
    total = 0
    for product in chain.products:
        kernels: list[set[str]] = [set(operands(product))]
        for stage in chain.epilogue(product.out):
            if isinstance(stage, Softmax):
                kernels.append({product.out})
            kernels[-1] |= set(operands(stage))
        total += sum(chain.num_bytes(name) for names in kernels for name in names)
        total += len(kernels) * chain.num_bytes(product.out)
    return total
