"""Where a kernel's data lies: tensors in memory, packed right operands, and tiles in a thread's scratch.

Of a letter K, `K_size` is the tensor's, `K_tile` the schedule's, `K_at` where the current tile starts, and `K_len` what
of it lies inside the tensor. Of a tensor A, `A_data` is its first entry and `A_K` its stride along K.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from fusion.plan import matrix_unit
from fusion.plan.chain import Chain
from fusion.plan.orientation import Roles, columns, roles
from fusion.plan.packing import Packing
from fusion.plan.stages import Elementwise
from fusion.plan.traffic import rounds_of

TYPES: Mapping[str, str] = {"fp32": "float", "fp16": "fp16", "bf16": "bf16"}
VECTOR = 16  # entries: of the widest instruction set; tiles of columns are its multiples
PAD = 16  # entries after a row, so that rows do not meet in one set of the cache


@dataclass(frozen=True)
class Storage:
    """The tensors of a chain and the tiles of a schedule.

    Source: not in the paper.
    """

    chain: Chain
    letters: Mapping[str, str]
    """Tensor -> its letters in storage order: those of the chain, and of what else the kernel writes."""
    sizes: Mapping[str, int]
    """Letter of a loop -> its tile size."""
    turning: str
    """Letters whose tiles are several: those of loops and of the grid."""
    live: Mapping[str, str]
    """Value -> letters over whose tiles it has a tile each."""
    panel_vectors: int
    """Of a panel of columns, at most."""
    packings: Mapping[str, Packing]
    """Inputs that are packed before they are read vector by vector."""
    fp32: frozenset[str] = frozenset()
    """What the kernel writes in fp32, whatever the chain's dtype."""

    @cached_property
    def column(self) -> Mapping[str, str]:
        """Value -> the letter of its vectors."""
        return columns(self.chain)

    @cached_property
    def roles(self) -> Mapping[str, Roles]:
        """Value -> the operands of its product."""
        return {product.out: roles(self.chain, product.out, self.column) for product in self.chain.products}

    @property
    def scratch(self) -> tuple[str, ...]:
        """Values, each with tiles in scratch."""
        return tuple(product.out for product in self.chain.products)

    @property
    def dtype(self) -> str:
        """Type of an entry of every tensor but masks and what is always fp32."""
        return TYPES[self.chain.dtype]

    def type_of(self, name: str) -> str:
        """Type of an entry of a tensor."""
        return "bool" if name in self.chain.boolean_inputs else "float" if name in self.fp32 else self.dtype

    def loops(self, name: str) -> str:
        """Letters of a tensor in storage order, without the batch's."""
        return "".join(letter for letter in self.letters[name] if letter not in self.chain.batch)

    def row(self, value: str) -> str:
        """The letter of a value that is not its column."""
        return self.loops(value).replace(self.column[value], "")

    def is_last(self, name: str, letter: str) -> bool:
        """Whether entries along a letter are adjacent: a launch sees to it for the last one."""
        return self.letters[name][-1] == letter

    def stride(self, name: str, letter: str) -> str:
        """Distance of entries along a letter."""
        return "1" if self.is_last(name, letter) else f"{name}_{letter}"

    def pointer(self, name: str, skip: str = "") -> str:
        """Where the current tile of a tensor starts; along the letters of `skip`, where the tensor does."""
        moves = [
            f" + {letter}_at" + ("" if self.is_last(name, letter) else f" * {name}_{letter}")
            for letter in self.letters[name]
            if letter not in skip and (letter in self.chain.batch or letter in self.turning)
        ]
        return "".join([f"{name}_data", *moves])

    @cached_property
    def in_unit(self) -> bool:
        """Whether products are made by a core's matrix unit, where it has one."""
        return matrix_unit.suits(self.chain, self.sizes, self.turning)

    @property
    def operand(self) -> str:
        """Type of an entry of what products read in scratch: `Half` is bf16 where there is a matrix unit."""
        return "Half" if self.in_unit else "float"

    def depth(self, over: str) -> str:
        """Steps of a packed operand along the letter of a sum."""
        return f"deep({over}_size)" if self.in_unit else f"{over}_size"

    @cached_property
    def by_panel(self) -> tuple[str, ...]:
        """Inputs that are packed by who reads them."""
        rounds = rounds_of(self.chain, self.sizes)
        return tuple(name for name, packing in self.packings.items() if packing.by_panel(rounds))

    @property
    def packed(self) -> tuple[str, ...]:
        """Inputs that are packed before all blocks."""
        return tuple(name for name in self.packings if name not in self.by_panel)

    @cached_property
    def widened(self) -> tuple[str, ...]:
        """Left operands whose tiles are copied as fp32, or rounded as their reader would find them in memory."""
        names = [name for roles in self.roles.values() for name in (roles.left, roles.right)]
        return () if self.chain.dtype == "fp32" else tuple(dict.fromkeys(n for n in names if n not in self.packings))

    @cached_property
    def read_exact(self) -> frozenset[str]:
        """Values that are read as they are before they are rounded: by stages of others, and by what stores them."""
        stages = [stage for stage in self.chain.stages if isinstance(stage, Elementwise)]
        return frozenset([self.chain.output, *(x.operand for x in stages if isinstance(x.operand, str))])

    def tile(self, value: str) -> str:
        """The current tile of a value, in scratch."""
        moves, factor = "", f"{value}_floats"
        for letter in reversed(self.live[value]):
            moves += f" + {letter}_at / {letter}_tile * {factor}"
            factor += f" * {letter}_tiles"
        return f"{value}_tile{moves}"

    def ld(self, value: str) -> str:
        """Distance of a tile's rows in scratch."""
        return str(self.row_entries(self.sizes[self.column[value]]))

    @staticmethod
    def row_entries(cols: int) -> int:
        """Entries from one row in scratch to the next."""
        return -(-cols // VECTOR) * VECTOR + PAD

    def wide_ld(self, column: str) -> str:
        """Distance of rows of an operand's copy: the matrix unit reads whole tiles of lines of the cache."""
        unit = matrix_unit.DEPTH
        cols = self.sizes[column]
        return str(-(-cols // unit) * unit + unit if self.in_unit else self.row_entries(cols))

    def tile_floats(self, value: str) -> int:
        """Entries of a value's tile, in whole tiles of the matrix unit."""
        return -(-self.sizes[self.row(value)] // matrix_unit.ROWS) * matrix_unit.ROWS * int(self.ld(value))

    def wide_shape(self, name: str) -> tuple[str, str]:
        """Row and column letter of a copy in fp32."""
        if name in self.scratch:
            return self.row(name), self.column[name]
        value = next(value for value, roles in self.roles.items() if roles.left == name)
        over = next(letter for letter in self.loops(name) if letter not in self.letters[value])
        return self.loops(name).replace(over, ""), over

    def buffers(self) -> Iterator[tuple[str, str]]:
        """Name and size, in entries, of what a thread keeps in scratch."""
        for value in self.scratch:
            floats = str(self.tile_floats(value))
            yield f"{value}_tile", " * ".join([floats, *(f"{letter}_tiles" for letter in self.live[value])])
        for name in self.widened:
            row, column = self.wide_shape(name)
            rows = -(-self.sizes[row] // matrix_unit.ROWS) * matrix_unit.ROWS
            yield f"{name}_wide", str(rows * int(self.wide_ld(column)))
        if self.by_panel:
            yield "panel_wide", str(self._panel_entries())

    def _panel_entries(self) -> int:
        """Room for the longest of the panels that are packed when their turn comes."""
        unit, vectors = matrix_unit.DEPTH, max(self.panel_vectors, matrix_unit.SIDE)
        longest = max(self.sizes[self.packings[name].over] for name in self.by_panel)
        return vectors * VECTOR * -(-longest // unit) * unit
