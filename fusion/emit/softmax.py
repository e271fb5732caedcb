"""The softmax of a value: in place where a tile holds all of its loop, else online.

Online, the loop keeps a running maximum and sum of every row; each round the sums of the readers are rescaled to the
new maximum, and divided by the sum when they are complete.

Source: not in the paper, which fuses self-attention without saying how; the online softmax is FlashAttention's.
"""

from dataclasses import dataclass

from fusion.emit.arithmetic import MINUS_INFINITY
from fusion.emit.tiles import At, Tiles, spread
from fusion.plan.chain import Chain
from fusion.plan.placement import Loop, Program
from fusion.plan.stages import Softmax
from fusion.plan.statements import Statement

MAXIMUM = "tl.standard._elementwise_max"  # tl.max and tl.sum are themselves compiled or interpreted, as this process
SUM = "tl.standard._sum_combine"  # first imported triton; tl.reduce with these is either, as the kernel is


@dataclass(frozen=True)
class Online:
    """A softmax around which its own loop turns.

    Source: not in the paper.
    """

    value: str
    loop: Loop
    """Over the tiles that the softmax needs."""
    inner: str
    """Letters of the loops inside it around the softmax: rows have a maximum and a sum for each of their tiles."""


def online_softmaxes(chain: Chain, program: Program) -> dict[str, Online]:
    """The softmaxes that are online in a program.

    Args:
        chain: Any.
        program: One of its legal programs.

    Returns:
        Value -> its softmax, if the softmax's loop turns.
    """
    paths = dict(program.walk())
    found = {}
    for stage in chain.stages:
        if isinstance(stage, Softmax):
            around = paths[Statement("F", stage.x)]
            letters = "".join(loop.letter for loop in around)
            if stage.over in letters:
                index = letters.index(stage.over)
                found[stage.x] = Online(stage.x, around[index], letters[index + 1 :])
    return found


@dataclass(frozen=True)
class SoftmaxText:
    """Lines of the softmaxes over one value's rows.

    Source: not in the paper.
    """

    tiles: Tiles
    value: str
    over: str

    @property
    def row(self) -> str:
        """The letter of the value's rows: the other one."""
        return self.tiles.loops(self.value).replace(self.over, "")

    @property
    def _axis(self) -> int:
        return self.tiles.loops(self.value).index(self.over)

    def _reduce(self, x: str, combine: str) -> str:
        return f"tl.reduce({x}, {self._axis}, {combine})"

    def _by_row(self, vector: str) -> str:
        return spread(vector, self.row, self.tiles.loops(self.value))

    def _masked(self, x: str, at: At) -> list[str]:
        """Entries that do not exist take no part."""
        inside = self.tiles.mask(self.over, at)
        if not inside:
            return []
        return [f"{x} = tl.where({spread(inside, self.over, self.tiles.loops(self.value))}, {x}, {MINUS_INFINITY})"]

    def rows(self, kind: str, inner: str, at: At) -> str:
        """Variable that has an entry for every row, such as the running `max` and `sum`."""
        return f"{kind}_{self.value}_{self.row}{self.tiles.suffix(inner, at)}"

    def start(self, inner: str, at: At) -> list[str]:
        """Before the loop of an online softmax."""
        shape = self.tiles.shape(self.row)
        return [
            f"{self.rows('max', inner, at)} = tl.full({shape}, {MINUS_INFINITY}, tl.float32)",
            f"{self.rows('sum', inner, at)} = tl.full({shape}, 0.0, tl.float32)",
        ]

    def step(self, x: str, inner: str, at: At) -> list[str]:
        """Inside it: exponents against the maximum so far, and what earlier rounds have to be scaled by."""
        running, total, scale = (self.rows(kind, inner, at) for kind in ("max", "sum", "scale"))
        peak, shift = self.rows("peak", inner, at), self.rows("shift", inner, at)
        return [
            *self._masked(x, at),
            f"{peak} = tl.maximum({running}, {self._reduce(x, MAXIMUM)})",
            f"{shift} = {_finite(peak)}",
            f"{scale} = tl.exp({running} - {shift})",
            f"{x} = tl.exp({x} - {self._by_row(shift)})",
            f"{total} = {total} * {scale} + {self._reduce(x, SUM)}",
            f"{running} = {peak}",
        ]

    def whole(self, x: str, at: At) -> list[str]:
        """In place, of a tile that holds all of the loop; leaves `max` and `sum` behind."""
        peak, total = self.rows("max", "", at), self.rows("sum", "", at)
        return [
            *self._masked(x, at),
            f"{peak} = {self._reduce(x, MAXIMUM)}",
            f"{x} = tl.exp({x} - {self._by_row(_finite(peak))})",
            f"{total} = {self._reduce(x, SUM)}",
            f"{x} = {x} / {self.divisor(total, self.tiles.loops(self.value))}",
        ]

    def divisor(self, total: str, letters: str) -> str:
        """Sums of rows by which a variable with `letters` is divided; a row without entries stays zero."""
        return spread(f"tl.where({total} == 0.0, 1.0, {total})", self.row, letters)


def _finite(peak: str) -> str:
    """Maxima to subtract: a row without entries has exp(-inf) = 0, not exp(-inf + inf), everywhere."""
    return f"tl.where({peak} == {MINUS_INFINITY}, 0.0, {peak})"
