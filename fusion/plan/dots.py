"""Which values stay in registers between two products, as Triton's compiler shares their tiles among warps.

A warp computes 16 rows by 8 columns at a time (CUDA), four warps together 64 rows (compute capability 9.0), or a square
of 16 or 32 (HIP). Where a value is the left operand of a product that gives every warp the rows it already has, the
value stays where it is; elsewhere it goes through shared memory.

Source: not in the paper, which leaves this to Triton; the rules are those of Triton 3.7's accelerate-matmul passes.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

from fusion.plan.chain import Chain
from fusion.plan.device import Device
from fusion.plan.statements import product_of

WARP_TILE = (16, 8)
WARP_GROUP_ROWS = 64
WARP_GROUP_WARPS = 4


@dataclass(frozen=True)
class Dots:
    """The products of a kernel.

    Source: not in the paper.
    """

    chain: Chain
    device: Device
    num_warps: int
    shapes: Mapping[str, tuple[int, ...]]
    """Value -> rows and columns of its tile's variable."""
    bodies: Mapping[str, Hashable]
    """Value -> which loop's body its product stands in."""

    def is_warp_group(self, value: str) -> bool:
        """Whether a value's product is one of four warps at a time, which read their operands in shared memory."""
        whole = self.shapes[value][0] >= WARP_GROUP_ROWS and self.num_warps % WARP_GROUP_WARPS == 0
        return self.device.arch == "90" and self.chain.dtype != "fp32" and whole

    def stays_in_registers(self, value: str, reader: str) -> bool:
        """Whether a value needs no shared memory to become an operand.

        Args:
            value: Of a product.
            reader: Value of a product that reads it.
        """
        if not self._is_left(value, reader):
            return False
        chained = self.bodies[value] == self.bodies[reader]
        if self.device.kind == "hip":
            square, rows = self._square(value), self.shapes[value][0]
            split_alike = rows <= square or rows >= square * self.num_warps
            return chained and square == self._square(reader) and split_alike
        if self.chain.dtype == "fp32":
            return False
        if self.is_warp_group(value):
            return chained or self.shapes[value][0] >= WARP_TILE[0] * self.num_warps
        if chained:
            products = [product.out for product in self.chain.products]
            rows, columns = self.shapes[[out for out in products if self.bodies[out] == self.bodies[value]][-1]]
            return rows >= columns or self.num_warps == 1
        return self._warps_down(value) == self._warps_down(reader) == self.num_warps

    def _is_left(self, value: str, reader: str) -> bool:
        """Whether the rows of a value are those of its reader."""
        tensors, loops = self.chain.tensors, self.chain.loops
        first, second = (next(x for x in tensors[name] if x in loops) for name in (value, reader))
        return first == second and first != product_of(self.chain, reader).over

    def _square(self, value: str) -> int:
        return 32 if min(self.shapes[value]) >= 32 else 16

    def _warps_down(self, value: str) -> int:
        """How many warps lie below each other, where a product stands alone."""
        rows, columns = (-(-size // unit) for size, unit in zip(self.shapes[value], WARP_TILE, strict=True))
        down = across = 1
        while down * across < self.num_warps:
            if down < rows and rows // down >= columns // across:
                down *= 2
            else:
                across *= 2
        return down
