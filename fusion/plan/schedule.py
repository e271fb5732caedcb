"""A schedule: one point of the search space, and the program that it stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fusion.plan.chain import Chain
from fusion.plan.expression import Expression, parse
from fusion.plan.placement import Program, grid_loops, place

MIN_BLOCK = 16  # of Triton's dot, along each of its dimensions


@dataclass(frozen=True)
class Schedule:
    """A tiling expression with a tile size for every loop, and how a GPU runs a block of it.

    Source: MCFuser (arXiv:2506.22169), section on the search space; warps and stages are not in the paper.
    """

    expression: Expression
    tiles: tuple[tuple[str, int], ...]
    """Letter and tile size of every loop, in the chain's order."""
    num_warps: int = 4
    """Warps of a block; a CPU has none."""
    num_stages: int = 1
    """Tiles of a loop's loads that are on their way at once; 1 is no pipeline."""
    micro: tuple[int, int] = (6, 4)
    """Of a CPU: rows, and vectors of columns, of the sums that a core keeps in registers."""

    def __str__(self) -> str:
        tiles = " ".join(f"{letter.lower()}{size}" for letter, size in self.tiles)
        return f"{self.expression} | {tiles} | {self.num_warps} warps, {self.num_stages} stages"

    def program(self, chain: Chain) -> Program:
        """The loops and statements of one block."""
        return place(chain, self.expression, dict(self.tiles), grid=grid_loops(chain, self.expression))


def schedule(
    chain: Chain, expression: str, tiles: Mapping[str, int], *, num_warps: int = 4, num_stages: int = 1
) -> Schedule:
    """A schedule from the paper's notation.

    Args:
        chain: What it is for.
        expression: Such as `mn(k,h)`.
        tiles: Letter -> tile size of every loop.
        num_warps: Warps of a block.
        num_stages: Tiles on their way at once.

    Returns:
        The schedule.

    Raises:
        ValueError: The text is no expression of the chain, or a tile is missing or not positive.

    Source: MCFuser (arXiv:2506.22169), Figure 3.
    """
    tree = parse(expression)
    place(chain, tree, tiles)
    return Schedule(tree, tuple((letter, tiles[letter]) for letter in chain.loops), num_warps, num_stages)


def block(size: int) -> int:
    """Entries of a tile's variable along a dimension: a power of two, at least what a product takes.

    Args:
        size: Of the tile.

    Source: not in the paper; Triton's.
    """
    return max(MIN_BLOCK, 1 << (size - 1).bit_length())
