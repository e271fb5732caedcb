"""Is a chain memory-bound although it is made of matrix products? Then it is worth fusing (the paper's MBCI chains).

The test compares the flops that a product does for each byte it moves with those that a device can do meanwhile.
"""

from dataclasses import dataclass

from fusion.plan.chain import Chain, DType
from fusion.plan.device import Device
from fusion.plan.statements import product_of
from fusion.plan.traffic import unfused_bytes


@dataclass(frozen=True)
class ProductIntensity:
    """What one product does for each byte.

    Source: MCFuser (arXiv:2506.22169), section on MBCI operators.
    """

    value: str
    tile: tuple[int, int]
    """T_M and T_N: the rows and columns of its value that are computed at once."""
    over: int
    """K, the length of its sum."""
    flops_per_byte: float
    """The paper's phi."""


@dataclass(frozen=True)
class Intensity:
    """The verdict on a chain, with all numbers that it rests on.

    Source: MCFuser (arXiv:2506.22169), section on MBCI operators.
    """

    device: str
    dtype: DType
    peak_flops_per_s: float
    """The paper's P."""
    dram_bytes_per_s: float
    """The paper's W."""
    products: tuple[ProductIntensity, ...]
    unfused_flops_per_byte: float
    """Of the whole chain, each product a kernel of its own."""
    fused_flops_per_byte: float
    """Of the whole chain if every input is read once, the output is written once, and nothing is computed twice."""

    @property
    def balance_flops_per_byte(self) -> float:
        """The flops that the device can do while it moves a byte: P / W."""
        return self.peak_flops_per_s / self.dram_bytes_per_s

    @property
    def memory_bound(self) -> tuple[str, ...]:
        """Values of the products that wait for memory on this device: phi < P / W."""
        balance = self.balance_flops_per_byte
        return tuple(product.value for product in self.products if product.flops_per_byte < balance)

    @property
    def is_mbci(self) -> bool:
        """Whether a product waits for memory; then not to write and read its operand or value saves time."""
        return bool(self.memory_bound)

    def __str__(self) -> str:
        phis = ", ".join(f"{product.value} {product.flops_per_byte:.4g}" for product in self.products)
        which = ", ".join(self.memory_bound) if self.is_mbci else "none"
        return (
            f"{'memory-bound' if self.is_mbci else 'compute-bound'} in {self.dtype} on {self.device}: below its "
            f"{self.balance_flops_per_byte:.4g} flop/byte are {which} (products: {phis}); "
            f"the chain has {self.unfused_flops_per_byte:.4g} unfused, {self.fused_flops_per_byte:.4g} fused"
        )


def intensity(chain: Chain, device: Device, *, tile: int | None = None) -> Intensity:
    """The MBCI test of a chain on a device.

    Args:
        chain: Whose dtype sets the bytes and the device's peak.
        device: What it would run on.
        tile: T_M and T_N of every product, cut to its size; None takes each value whole, which reads every operand
            once: a product that waits for memory even then does so under any tiles.

    Returns:
        The verdict.

    Raises:
        ValueError: The tile is not positive.

    Source: MCFuser (arXiv:2506.22169), section on MBCI operators, with the denominator of `flops_per_byte`.
    """
    if tile is not None and tile < 1:
        raise ValueError(f"tile={tile} must be at least 1, or None for whole values")
    sizes, tensors = chain.sizes, chain.tensors
    products = []
    for value in (product.out for product in chain.products):
        rows, columns = (sizes[letter] for letter in tensors[value] if letter in chain.loops)
        if tile is not None:
            rows, columns = min(rows, tile), min(columns, tile)
        over = sizes[product_of(chain, value).over]
        phi = flops_per_byte(rows, columns, over, chain.item_bytes)
        products.append(ProductIntensity(value, (rows, columns), over, phi))
    return Intensity(
        device=device.name,
        dtype=chain.dtype,
        peak_flops_per_s=device.flops_per_s(chain.dtype),
        dram_bytes_per_s=device.dram_bytes_per_s,
        products=tuple(products),
        unfused_flops_per_byte=chain.flops / max(unfused_bytes(chain), 1),
        fused_flops_per_byte=chain.flops / max(chain.io_bytes, 1),
    )


def flops_per_byte(rows: int, columns: int, over: int, item_bytes: int) -> float:
    """The paper's phi = 2 T_M T_N K / (2 T_M T_N + T_M K + T_N K), per byte.

    Args:
        rows: T_M.
        columns: T_N.
        over: K.
        item_bytes: Bytes of an entry.

    Returns:
        Flops for each byte: the operands' tiles are read, the value's is written and read again by what comes next.

    Source: MCFuser (arXiv:2506.22169), section on MBCI operators. Our reading of its denominator: as it is quoted, with
        2 T_M T_N K in it, the quotient would always be below 1.
    """
    moved = 2 * rows * columns + (rows + columns) * over
    return 2 * rows * columns * over / (item_bytes * moved) if moved else 0.0
