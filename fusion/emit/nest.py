"""The loops of a program as lines of Triton: what starts before a loop, its rounds, and what is complete after it.

A loop is a `for`, unless a value has a variable for each of its tiles: variables are not indexed, so the loop's body is
written out once for every tile.

Source: not in the paper, which leaves a tile's text to TVM; what stands where is its placement.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fusion.emit.causal import bounds
from fusion.emit.softmax import SoftmaxText
from fusion.emit.statements import StatementText
from fusion.emit.tiles import At, Tiles
from fusion.plan.placement import Loop, Program, is_written_out, statements_in
from fusion.plan.statements import Statement, product_of, uses

INDENT = "    "


@dataclass(frozen=True)
class Nest:
    """What it takes to write a program.

    Source: not in the paper.
    """

    tiles: Tiles
    program: Program
    text: StatementText

    def body(self, items: Sequence[Loop | Statement], at: At) -> Iterator[str]:
        """Lines of loops and statements in a row."""
        for item in items:
            yield from self._loop(item, at) if isinstance(item, Loop) else self.text.lines(item, at)

    def _loop(self, loop: Loop, at: At) -> Iterator[str]:
        made = [x.tensor for x in statements_in(loop.body) if x.kind == "C"]
        sums = [value for value in made if product_of(self.tiles.chain, value).over == loop.letter]
        states = list(self._states(loop, at))
        yield f"# {loop.letter}, {loop.extent} tiles"
        for value in sums + self._escaping(loop):
            yield from (self.text.zeros(value, each) for each in self._tiles_inside(loop, value, at))
        for rows, inner, each in states:
            yield from rows.start(inner, each)
        yield from self._rounds(loop, sums, at)
        for value in sums:
            for each in self._tiles_inside(loop, value, at):
                yield from self.text.divide(value, each)
        for rows, inner, each in states:
            yield from self.text.store_lse(rows, inner, each)

    def _rounds(self, loop: Loop, sums: list[str], at: At) -> Iterator[str]:
        letter, tile = loop.letter, self.tiles.sizes[loop.letter]
        if is_written_out(loop, self.tiles.chain, self.tiles.live):
            for index in range(loop.extent):
                yield f"# {letter}, tile {index + 1} of {loop.extent}"
                yield from self.body(loop.body, {**at, letter: index * tile})
            return
        first, end = "0", str(self.tiles.chain.sizes[letter])
        if not self._escaping(loop):  # what is read afterwards is sums
            inner = {other.letter for other in _loops(loop)}
            known = "".join(other for other in self.tiles.sizes if other not in inner)
            first, end = bounds(self.tiles, sums, letter, known, at)
        name = letter.lower()
        yield f"for {name} in range({first}, {end}, {tile}):"
        yield from (INDENT + line for line in self.body(loop.body, {**at, letter: name}))

    def _states(self, loop: Loop, at: At) -> Iterator[tuple[SoftmaxText, str, At]]:
        """Rows of the online softmaxes of a loop, with their loops inside it, for every tile of these."""
        extents = {inner.letter: inner.extent for inner in _loops(loop)}
        for softmax in self.text.online.values():
            if softmax.loop == loop:
                for each in self.tiles.every(softmax.inner, extents, at):
                    yield self.text.rows(softmax.value), softmax.inner, each

    def _tiles_inside(self, loop: Loop, value: str, at: At) -> Iterator[At]:
        """Where each of a value's variables is that loops inside this one fill."""
        path = self._path(value)
        inner = {other.letter: other.extent for other in path[path.index(loop) + 1 :]}
        yield from self.tiles.every("".join(x for x in self.tiles.live[value] if x in inner), inner, at)

    def _escaping(self, loop: Loop) -> list[str]:
        """Values that are made anew in every round of a loop, and read after it."""
        inside = list(statements_in(loop.body))
        made = [x.tensor for x in inside if x.kind == "C" and not self._is_inside_sum(x.tensor, loop)]
        return [value for value in made if not uses(self.tiles.chain, value) <= set(inside)]

    def _is_inside_sum(self, value: str, loop: Loop) -> bool:
        path, over = self._path(value), product_of(self.tiles.chain, value).over
        return any(other.letter == over for other in path[: path.index(loop) + 1])

    def _path(self, value: str) -> tuple[Loop, ...]:
        return next(loops for statement, loops in self.program.walk() if statement == Statement("C", value))


def _loops(loop: Loop) -> Iterator[Loop]:
    """A loop and all that are inside it."""
    yield loop
    for item in loop.body:
        if isinstance(item, Loop):
            yield from _loops(item)
