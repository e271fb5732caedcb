"""Where each statement stands: an expression with tile sizes becomes a nest of loops around statements.

A product's compute stands in the innermost loop of its own, under all that is around it there: its sum starts anew in
every round of a loop around the sum, and inside the sum there are only loops of its own. Values are read when they are
complete, so the loops that earlier products sum over have ended by then: a consumer's loops are those of the expression
without them. Loads and stores move out of every loop that does not index their tile, and a loop of one round is none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from fusion.plan.chain import Chain
from fusion.plan.expression import Expression, product_loops
from fusion.plan.statements import Statement, dependence_graph, pending_sums, product_of, touches, uses


@dataclass(frozen=True)
class Loop:
    """Rounds over the tiles of one dimension.

    Source: MCFuser (arXiv:2506.22169), Figure 4.
    """

    letter: str
    extent: int
    body: tuple[Loop | Statement, ...]

    def __str__(self) -> str:
        return f"{self.letter.lower()} {_written(self.body)}"


@dataclass(frozen=True)
class Program:
    """A nest of loops around statements; `grid` holds the loops that are spread over blocks, with their extents.

    Source: MCFuser (arXiv:2506.22169), Figures 4 and 5.
    """

    grid: tuple[tuple[str, int], ...]
    body: tuple[Loop | Statement, ...]

    def __str__(self) -> str:
        blocks = " ".join(letter.lower() for letter, _ in self.grid)
        return f"[{blocks}] {_written(self.body)}" if self.grid else _written(self.body)

    def walk(self) -> Iterator[tuple[Statement, tuple[Loop, ...]]]:
        """Every statement in program order, with the loops around it, outermost first, the grid's left out."""
        yield from _walk(self.body, ())


def place(
    chain: Chain, expression: Expression, tiles: Mapping[str, int], *, grid: str = "", hoist: bool = True
) -> Program:
    """The loop nest of an expression with tile sizes.

    Args:
        chain: What is computed.
        expression: One of its tiling expressions.
        tiles: Letter -> tile size of every loop.
        grid: Letters of loops that are spread over blocks; statements do not leave them, and none may sum over one.
        hoist: Whether loads and stores move out of loops, and loops of one round vanish; without, it is the naive
            placement, all statements in the innermost loop around their product.

    Returns:
        The program.

    Raises:
        ValueError: A tile is missing or not positive, or the expression is another chain's.

    Source: MCFuser (arXiv:2506.22169), Figures 4 and 5; the rule for complete values is not in the paper.
    """
    _check(chain, expression, tiles)
    extents = {letter: -(-max(chain.sizes[letter], 1) // tiles[letter]) for letter in chain.loops}
    live = {letter for letter in extents if letter not in grid and (extents[letter] > 1 or not hoist)}
    graph = dependence_graph(chain)
    loads = {node.statement: node.scope for node in graph if node.statement.kind == "L"}
    nest = _Nest(extents)
    for node in graph:
        kind, value = node.statement.kind, node.statement.tensor
        if kind == "L":
            continue
        around = [letter for letter in _loops_around(chain, expression, value, grid) if letter in live]
        if kind == "F" or (kind == "S" and hoist):
            around = [letter for letter in around if letter != product_of(chain, value).over]
        nest.open(around)
        for load in node.after:
            if load in loads:
                nest.load(load, loads[load] if hoist else "".join(around))
        nest.append(node.statement)
    blocks = tuple((letter, extents[letter]) for letter in chain.loops if letter in grid)
    return Program(blocks, nest.frozen())


def grid_loops(chain: Chain, expression: Expression) -> str:
    """The loops of an expression that are spread over blocks.

    Args:
        chain: What is computed.
        expression: One of its tiling expressions.

    Returns:
        Loops of the output that stand outside of every sum of the last product, or that index all products and so may
        always be moved there.

    Source: our reading of MCFuser's rule 1, which gives the paper's five classes.
    """
    last = chain.products[-1]
    loops = product_loops(chain).values()
    paths = expression.paths
    return "".join(
        letter
        for letter in chain.loops
        if letter in chain.tensors[last.out] and (last.over not in paths[letter] or all(letter in own for own in loops))
    )


def live_tiles(program: Program, chain: Chain) -> dict[str, str]:
    """For every value the loops over whose tiles several of its tiles are kept at once.

    Args:
        program: Of the chain.
        chain: Any.

    Returns:
        Value -> its letters whose loop turns between the start of its sum and its last use; none for most.

    Source: not in the paper, whose rule 2 drops expressions for it.
    """
    return {product.out: _live(program, chain, product.out) for product in chain.products}


def num_shared(first: Sequence[object], second: Sequence[object]) -> int:
    """How many loops two nests have in common, from the outermost on; loops of one letter may stand side by side.

    Args:
        first: Loops, outermost first.
        second: Likewise.

    Source: not in the paper.
    """
    pairs = zip(first, second, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def statements_in(items: Sequence[Loop | Statement]) -> Iterator[Statement]:
    """All statements of a body, those of the loops in it too, in program order.

    Args:
        items: Of a loop or a program.

    Source: MCFuser (arXiv:2506.22169), Figure 4.
    """
    return (statement for statement, _ in _walk(items, ()))


def is_written_out(loop: Loop, chain: Chain, live: Mapping[str, str]) -> bool:
    """Whether a kernel has a loop's rounds one after the other, for a value has a variable for each of its tiles there.

    Args:
        loop: Of a program.
        chain: That it computes.
        live: As `live_tiles` of the program.

    Source: not in the paper: variables of a kernel are not indexed.
    """
    touched = {name for statement in statements_in(loop.body) for name in touches(chain, statement)}
    return any(loop.letter in live.get(name, "") for name in touched)


def _live(program: Program, chain: Chain, value: str) -> str:
    paths, over = dict(program.walk()), product_of(chain, value).over
    own = paths[Statement("C", value)]
    start = tuple(takewhile(lambda loop: loop.letter != over, own))
    shared = min(num_shared(start, paths[use]) for use in uses(chain, value))
    return "".join(loop.letter for loop in own[shared:] if loop.letter in chain.tensors[value])


def _check(chain: Chain, expression: Expression, tiles: Mapping[str, int]) -> None:
    if sorted(expression.paths) != sorted(chain.loops):
        raise ValueError(f"expression={str(expression)!r} must have the loops {chain.loops.lower()!r}, each once")
    for letter in chain.loops:
        if type(tiles.get(letter)) is not int or tiles[letter] < 1:
            raise ValueError(f"tiles[{letter!r}]={tiles.get(letter)!r} must be a positive int; every loop needs one")
    for value, own in product_loops(chain).items():
        innermost = max((expression.paths[letter] for letter in own), key=len)
        if not set(own) <= set(innermost):
            raise ValueError(f"expression={str(expression)!r}: the loops {own.lower()!r} of {value} must nest")


def _loops_around(chain: Chain, expression: Expression, value: str, grid: str) -> str:
    """Loops around a product's compute, outermost first; those of the grid are outside of all of them."""
    paths, own = expression.paths, product_loops(chain)[value]
    around = max((paths[letter] for letter in own if letter not in grid), key=len, default="")
    repeats, over, sums = around.partition(product_of(chain, value).over)
    skipped = grid + pending_sums(chain, value)
    nest = repeats + over + "".join(letter for letter in sums if letter in own)
    return "".join(letter for letter in nest if letter not in skipped)


class _Nest:
    """Bodies of the loops that are open, outermost first; statements are only ever added to them."""

    def __init__(self, extents: Mapping[str, int]) -> None:
        self.extents = extents
        self.letters: list[str] = []
        self.bodies: list[list[Any]] = [[]]

    def open(self, letters: Sequence[str]) -> None:
        """Close loops until the rest agrees with `letters`, and open those that are missing."""
        shared = num_shared(self.letters, letters)
        del self.letters[shared:], self.bodies[shared + 1 :]
        for letter in letters[shared:]:
            body: list[Any] = []
            self.bodies[-1].append((letter, body))
            self.letters.append(letter)
            self.bodies.append(body)

    def load(self, load: Statement, scope: str) -> None:
        """Add a load to the innermost open loop of its scope, before what is open in it, unless it is there."""
        depth = max((index + 1 for index, letter in enumerate(self.letters) if letter in scope), default=0)
        body = self.bodies[depth]
        if load not in body:
            body.insert(len(body) if depth == len(self.letters) else len(body) - 1, load)

    def append(self, statement: Statement) -> None:
        self.bodies[-1].append(statement)

    def frozen(self) -> tuple[Loop | Statement, ...]:
        return self._frozen(self.bodies[0])

    def _frozen(self, body: list[Any]) -> tuple[Loop | Statement, ...]:
        return tuple(
            item if isinstance(item, Statement) else Loop(item[0], self.extents[item[0]], self._frozen(item[1]))
            for item in body
        )


def _walk(body: Sequence[Loop | Statement], around: tuple[Loop, ...]) -> Iterator[tuple[Statement, tuple[Loop, ...]]]:
    for item in body:
        if isinstance(item, Loop):
            yield from _walk(item.body, (*around, item))
        else:
            yield item, around


def _written(body: Sequence[Loop | Statement]) -> str:
    if len(body) == 1 and isinstance(body[0], Loop):
        return str(body[0])
    return "{ " + " ".join(str(item) for item in body) + " }"
