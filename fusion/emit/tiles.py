"""Tiles in Triton's text: what a variable is called, where a tile lies in its tensor, and which of its entries exist.

Every name that a chain gives a tensor is joined with something that no other kind of name has, so none can clash:
`A_ptr`, `A_base` and `A_M_stride` are arguments and addresses, `tile_A_MK` a loaded tile, `acc_C_MN` a value. `m` is
the first index of the current tile along M, `i_M` are the indices inside a tile.

Source: not in the paper, which leaves a tile's text to TVM.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product as combinations

from fusion.plan.chain import Chain
from fusion.plan.schedule import block

TYPES = {"fp32": "tl.float32", "fp16": "tl.float16", "bf16": "tl.bfloat16"}

At = Mapping[str, int | str]
"""Letter -> first index of its current tile: a number where it is known, else the name of a variable."""


@dataclass(frozen=True)
class Tiles:
    """The tiles of one schedule.

    Source: not in the paper.
    """

    chain: Chain
    letters: Mapping[str, str]
    """Tensor -> its letters in storage order: those of the chain, and of what else the kernel writes."""
    sizes: Mapping[str, int]
    """Letter of a loop -> its tile size."""
    live: Mapping[str, str]
    """Value -> letters over whose tiles it has a variable each."""
    fixed: str
    """Letters that a block's own index settles."""

    def block(self, letter: str) -> int:
        """Entries of a tile's variable along a letter: a power of two, at least what a dot takes."""
        return block(self.sizes[letter])

    def loops(self, name: str) -> str:
        """Letters of a tensor's tile in storage order: all but the batch's."""
        return "".join(letter for letter in self.letters[name] if letter not in self.chain.batch)

    def shape(self, letters: str) -> str:
        """Shape of a variable with these letters."""
        return f"({', '.join(str(self.block(letter)) for letter in letters)}{',' if len(letters) == 1 else ''})"

    def tile(self, name: str) -> str:
        """Variable of an input's tile."""
        return f"tile_{name}_{self.loops(name)}"

    def value(self, name: str, at: At) -> str:
        """Variable of a value's tile, one of several where several are live."""
        return f"acc_{name}_{self.loops(name)}{self.suffix(self.live[name], at)}"

    def suffix(self, letters: str, at: At) -> str:
        """What tells the variables of several live tiles apart: the tile's number along each letter."""
        return "".join(f"_{int(at[letter]) // self.sizes[letter]}" for letter in letters)

    def every(self, letters: str, extents: Mapping[str, int], at: At) -> Iterator[At]:
        """`at` for each of the tiles along these letters."""
        starts = [[index * self.sizes[letter] for index in range(extents[letter])] for letter in letters]
        for chosen in combinations(*starts):
            yield {**at, **dict(zip(letters, chosen, strict=True))}

    def inside(self, letter: str, at: At) -> str:
        """Which indices along a letter belong to the tile and to the tensor; nothing if all do."""
        tile, size, start, whole = self.sizes[letter], self.chain.sizes[letter], at[letter], self.block(letter)
        if isinstance(start, int):
            width = max(min(tile, size - start), 0)
            return f"i_{letter} < {width}" if width < whole else ""
        limits = [str(tile)] if tile < whole else []
        limits += [f"{size} - {start}"] if size % tile else []
        return " & ".join(f"(i_{letter} < {limit})" if len(limits) > 1 else f"i_{letter} < {limit}" for limit in limits)

    def mask(self, letters: str, at: At) -> str:
        """Which entries of a variable with these letters exist; nothing if all do."""
        parts = [(self.inside(letter, at), letter) for letter in letters]
        return " & ".join(spread(inside, letter, letters) for inside, letter in parts if inside)

    def addresses(self, name: str, at: At) -> Iterator[str]:
        """Lines that find a tensor's part that a block works on, and where a tile's entries are from its first one."""
        loops = self.loops(name)
        yield f"{name}_base = {_sum([f'{name}_ptr', *self._starts(name, self.fixed, at)])}"
        if loops:
            steps = [spread(f"i_{letter} * {name}_{letter}_stride", letter, loops) for letter in loops]
            yield f"{self._offsets(name)} = {_sum(steps)}"

    def load(self, name: str, at: At) -> str:
        """A tile of an input in storage order, zero where there is no entry."""
        mask = self.mask(self.loops(name), at)
        guard = f", mask={mask}, other=0" if mask else ""
        return f"tl.load({self._pointers(name, at)}{guard})"

    def store(self, name: str, value: str, at: At) -> str:
        """Write a variable, whose letters are in storage order, to a tensor."""
        mask = self.mask(self.loops(name), at)
        return f"tl.store({self._pointers(name, at)}, {value}{f', mask={mask}' if mask else ''})"

    def _pointers(self, name: str, at: At) -> str:
        loops = self.loops(name)
        moving = "".join(letter for letter in loops if letter not in self.fixed)
        offsets = [self._offsets(name)] if loops else []
        return _sum([f"{name}_base", *self._starts(name, moving, at), *offsets])

    def _offsets(self, name: str) -> str:
        return f"offset_{name}_{self.loops(name)}"

    def _starts(self, name: str, letters: str, at: At) -> list[str]:
        """How far a tile is from its tensor's start along some letters, in 64 bits: a tensor may be large."""
        return [
            f"{at[letter] if letter in self.chain.batch else _wide(at[letter])} * {name}_{letter}_stride"
            for letter in self.letters[name]
            if letter in letters and at[letter] != 0
        ]


def spread(text: str, letter: str, letters: str) -> str:
    """A vector along one letter as a view that broadcasts against a variable with `letters`."""
    if len(letters) == 1:
        return text
    text = text if text.isidentifier() else f"({text})"
    return f"{text}[:, None]" if letters.index(letter) == 0 else f"{text}[None, :]"


def along(text: str, letters: str, target: str) -> str:
    """A variable with some of the letters of `target` as a view that broadcasts against one with all of them."""
    if len(letters) == 1:
        return spread(text, letters, target)
    return text if letters in ("", target) else f"tl.trans({text})"


def _sum(terms: Sequence[str]) -> str:
    return " + ".join(terms)


def _wide(index: int | str) -> str:
    return f"tl.cast({index}, tl.int64)"
