"""The statements of a program as lines of Triton: load, compute, finish and store one tile.

Source: MCFuser (arXiv:2506.22169), Figure 4, for the statements; their text, and all between the products, is ours.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from fusion.emit.arithmetic import causal, elementwise, keeps_zeros
from fusion.emit.softmax import Online, SoftmaxText
from fusion.emit.tiles import TYPES, At, Tiles, along, spread
from fusion.plan.stages import Causal, Elementwise, Softmax, operands
from fusion.plan.statements import Statement, product_of


@dataclass(frozen=True)
class StatementText:
    """Lines of the statements of one program.

    Source: not in the paper.
    """

    tiles: Tiles
    online: dict[str, Online]
    summed: frozenset[str]
    """Values whose sum takes more than one round."""
    lse: str
    """Tensor that the softmax's log-sum-exp is stored to; none if empty."""
    exact: bool
    """Whether the output is stored in fp32."""
    upcast: bool
    """Whether products are taken in fp32, of operands that are not rounded."""

    def lines(self, statement: Statement, at: At) -> Iterator[str]:
        """The lines of a statement on the tiles that are at `at`."""
        name, tiles = statement.tensor, self.tiles
        match statement.kind:
            case "L":
                yield f"{tiles.tile(name)} = {tiles.load(name, at)}"
            case "C":
                yield from self._compute(name, at)
            case "F":
                yield from self._finish(name, at)
            case "S":
                dtype = "fp32" if self.exact else tiles.chain.dtype
                yield tiles.store(name, f"{tiles.value(name, at)}.to({TYPES[dtype]})", at)

    def zeros(self, value: str, at: At) -> str:
        """The line that starts a sum."""
        shape = self.tiles.shape(self.tiles.loops(value))
        return f"{self.tiles.value(value, at)} = tl.full({shape}, 0.0, tl.float32)"

    def rows(self, value: str) -> SoftmaxText:
        """Lines of a value's online softmax."""
        return SoftmaxText(self.tiles, value, self.online[value].loop.letter)

    def divide(self, value: str, at: At) -> Iterator[str]:
        """A complete sum over the entries of an online softmax becomes their average."""
        acc = self.tiles.value(value, at)
        for softmax, rows in self._online_operands(value):
            total = rows.rows("sum", softmax.inner, at)
            yield f"{acc} = {acc} / {rows.divisor(total, self.tiles.loops(value))}"

    def store_lse(self, rows: SoftmaxText, inner: str, at: At) -> Iterator[str]:
        """Write the log-sum-exp of a softmax that is complete, if it is asked for."""
        if self.lse:
            peak, total = rows.rows("max", inner, at), rows.rows("sum", inner, at)
            yield self.tiles.store(self.lse, f"{peak} + tl.log({total})", at)

    def _compute(self, value: str, at: At) -> Iterator[str]:
        """One round of a product's sum, or all of it."""
        tiles, product = self.tiles, product_of(self.tiles.chain, value)
        acc, letters = tiles.value(value, at), tiles.loops(value)
        first, second = sorted(operands(product), key=lambda name: letters[0] not in tiles.loops(name))
        for softmax, rows in self._online_operands(value):
            scale = rows.rows("scale", softmax.inner, at)
            yield f"{acc} = {acc} * {spread(scale, rows.row, letters)}"
        arguments = [
            self._operand(first, letters[0] + product.over, at),
            self._operand(second, product.over + letters[1], at),
        ]
        if value in self.summed:
            arguments.append(acc)
        if tiles.chain.dtype == "fp32" or self.upcast:
            arguments.append('input_precision="ieee"')
        yield f"{acc} = tl.dot({', '.join(arguments)})"

    def _operand(self, name: str, letters: str, at: At) -> str:
        """A tensor's tile as an operand of a dot, rounded to the chain's dtype and with its letters in this order."""
        tiles, dtype = self.tiles, self.tiles.chain.dtype
        if name in tiles.live:
            text = tiles.value(name, at) + ("" if dtype == "fp32" or self.upcast else f".to({TYPES[dtype]})")
        else:
            text = tiles.tile(name) + (".to(tl.float32)" if self.upcast and dtype != "fp32" else "")
        return along(text, tiles.loops(name), letters)

    def _finish(self, value: str, at: At) -> Iterator[str]:
        """A value's epilogue, after which what is no entry of the value counts for nothing in a sum."""
        tiles, chain = self.tiles, self.tiles.chain
        x, letters = tiles.value(value, at), tiles.loops(value)
        for stage in chain.epilogue(value):
            match stage:
                case Elementwise():
                    yield from elementwise(stage.operation, x, self._epilogue_operand(stage, letters, at))
                case Causal(_, row, column):
                    yield causal(stage, x, _indices(row, letters, at), _indices(column, letters, at))
                case Softmax():
                    yield from self._softmax(stage, x, at)
        for reader in chain.products:
            inside = tiles.mask(reader.over, at) if value in operands(reader) else ""
            if inside and not keeps_zeros(chain, value, reader.over):
                yield f"{x} = tl.where({spread(inside, reader.over, letters)}, {x}, 0.0)"

    def _epilogue_operand(self, stage: Elementwise, letters: str, at: At) -> str:
        if not isinstance(stage.operand, str):
            return "" if stage.operand is None else repr(stage.operand)
        name = stage.operand
        if name in self.tiles.live:
            return self.tiles.value(name, at)
        text = along(self.tiles.tile(name), self.tiles.loops(name), letters)
        return text if stage.operation == "mask" else f"{text}.to(tl.float32)"

    def _softmax(self, stage: Softmax, x: str, at: At) -> Iterator[str]:
        online = self.online.get(stage.x)
        is_online = online is not None and online.loop.letter == stage.over
        yield f"# softmax over {stage.over}{', online' if is_online else ''}"
        if online is not None and is_online:
            yield from self.rows(stage.x).step(x, online.inner, at)
        else:
            rows = SoftmaxText(self.tiles, stage.x, stage.over)
            yield from rows.whole(x, at)
            yield from self.store_lse(rows, "", at)

    def _online_operands(self, value: str) -> Iterator[tuple[Online, SoftmaxText]]:
        for name in operands(product_of(self.tiles.chain, value)):
            if name in self.online:
                yield self.online[name], self.rows(name)


def _indices(letter: str, letters: str, at: At) -> str:
    inside = spread(f"i_{letter}", letter, letters)
    return inside if at[letter] == 0 else f"({at[letter]} + {inside})"
