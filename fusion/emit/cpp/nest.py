"""The loops of a program as lines of C++: what starts before a loop, its rounds, and what is complete after it.

Source: not in the paper, which leaves a tile's text to TVM; what stands where is its placement.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fusion.emit.causal import vanishing
from fusion.emit.cpp.statements import INDENT, StatementText
from fusion.emit.cpp.storage import Storage
from fusion.plan.placement import Loop, Program, statements_in
from fusion.plan.stages import operands
from fusion.plan.statements import Statement, product_of, uses


@dataclass(frozen=True)
class Nest:
    """What it takes to write a program.

    Source: not in the paper.
    """

    storage: Storage
    program: Program
    text: StatementText

    def body(self, items: Sequence[Loop | Statement]) -> Iterator[str]:
        """Lines of loops and statements in a row."""
        for item in items:
            yield from self._loop(item) if isinstance(item, Loop) else self.text.lines(item)

    def _loop(self, loop: Loop) -> Iterator[str]:
        chain = self.storage.chain
        made = [x.tensor for x in statements_in(loop.body) if x.kind == "C"]
        sums = [value for value in made if product_of(chain, value).over == loop.letter]
        states = [x for x in self.text.online.values() if x.loop == loop]
        for value in sums:
            yield from self._for_tiles_inside(loop, self.storage.live[value], self.text.zeros(value))
        for state in states:
            yield from self._for_tiles_inside(loop, state.inner, self.text.start(state.value))
        first, end = "0", f"{loop.letter}_size"
        if not self._escaping(loop):  # what is read afterwards is sums
            first, end = self._bounds(loop, sums)
        yield from _rounds(loop.letter, first, end, self.body(loop.body))
        for value in sums:
            for line in self.text.divide(value):
                yield from self._for_tiles_inside(loop, self.storage.live[value], line)
        for state in states:
            for line in self.text.store_lse(state.value):
                yield from self._for_tiles_inside(loop, state.inner, line)

    def _for_tiles_inside(self, loop: Loop, letters: str, line: str) -> Iterator[str]:
        """A line for each of the tiles along those of some letters whose loops are inside this one."""
        inner = {other.letter for other in _loops(loop)} - {loop.letter}
        lines: Iterator[str] = iter([line])
        for letter in reversed([letter for letter in letters if letter in inner]):
            lines = _rounds(letter, "0", f"{letter}_size", lines)
        yield from lines

    def _bounds(self, loop: Loop, sums: Sequence[str]) -> tuple[str, str]:
        """First index and end, without rounds in which a causal mask leaves nothing."""
        inner = {other.letter for other in _loops(loop)}
        found = {self._bounds_of(value, loop.letter, inner) for value in sums}
        return found.pop() if len(found) == 1 else ("0", f"{loop.letter}_size")

    def _bounds_of(self, value: str, letter: str, inner: set[str]) -> tuple[str, str]:
        chain, size = self.storage.chain, f"{letter}_size"
        for name in operands(product_of(chain, value)):
            mask = vanishing(chain, name) if name in self.storage.scratch else None
            if mask is not None and mask.column == letter and mask.row not in inner:
                return "0", f"std::min({size}, {mask.row}_at + {mask.row}_len + ({mask.diagonal}))"
            if mask is not None and mask.row == letter and mask.column not in inner:
                start = f"std::max<int64_t>(0, {mask.column}_at - ({mask.diagonal}))"
                return f"{start} / {letter}_tile * {letter}_tile", size
        return "0", size

    def _escaping(self, loop: Loop) -> list[str]:
        """Values that are made anew in every round of a loop, and read after it."""
        inside = list(statements_in(loop.body))
        made = [x.tensor for x in inside if x.kind == "C" and not self._is_inside_sum(x.tensor, loop)]
        return [value for value in made if not uses(self.storage.chain, value) <= set(inside)]

    def _is_inside_sum(self, value: str, loop: Loop) -> bool:
        path = next(loops for statement, loops in self.program.walk() if statement == Statement("C", value))
        over = product_of(self.storage.chain, value).over
        return any(other.letter == over for other in path[: path.index(loop) + 1])


def _rounds(letter: str, first: str, end: str, body: Iterator[str]) -> Iterator[str]:
    yield f"for (int64_t {letter}_at = {first}; {letter}_at < {end}; {letter}_at += {letter}_tile) {{"
    yield f"{INDENT}const int64_t {letter}_len = std::min({letter}_tile, {letter}_size - {letter}_at);"
    yield from (INDENT + line for line in body)
    yield "}"


def _loops(loop: Loop) -> Iterator[Loop]:
    """A loop and all that are inside it."""
    yield loop
    for item in loop.body:
        if isinstance(item, Loop):
            yield from _loops(item)
