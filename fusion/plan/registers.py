"""Registers that a block's sums take: accumulators stay there from their first step to their last reader."""

from collections.abc import Mapping
from math import prod

from fusion.plan.chain import Chain
from fusion.plan.device import Device
from fusion.plan.placement import Loop, Program, live_tiles, num_shared
from fusion.plan.schedule import Schedule, block
from fusion.plan.statements import Statement, product_of, uses

Path = tuple[Loop, ...]
MAX_SHARE = 0.75  # of a multiprocessor's registers; of kernels compiled for three targets none with more sums fitted


def accumulator_registers(chain: Chain, program: Program, tiles: Mapping[str, int]) -> int:
    """The most registers of 32 bits that sums take at once.

    Args:
        chain: What is computed.
        program: One of it.
        tiles: Letter -> entries of a tile along it, as the kernel has them.

    Returns:
        Entries of all accumulators in use, where these are most: sums are fp32.

    Source: not in the paper, whose rule 4 counts shared memory alone.
    """
    statements = list(program.walk())
    in_use = [0] * len(statements)
    for product in chain.products:
        value = product.out
        live = live_tiles(program, chain)[value]
        number = prod(loop.extent for loop in dict(statements)[Statement("C", value)] if loop.letter in live)
        entries = number * prod(tiles[letter] for letter in chain.tensors[value] if letter in tiles)
        first, last = _lifetime(chain, statements, value)
        for index in range(first, last + 1):
            in_use[index] += entries
    return max(in_use)


def register_limit(chain: Chain, schedule: Schedule, device: Device) -> str | None:
    """The sums of a block leave no registers for anything else, so that its kernel would spill whatever its warps.

    Args:
        chain: What is computed.
        schedule: Expression and tiles.
        device: Whose registers; a CPU keeps sums in its caches.

    Returns:
        The reason to drop the schedule, or None.

    Source: not in the paper, which finds out when it measures.
    """
    limit = int(MAX_SHARE * device.registers_per_sm)
    blocks = {letter: block(tile) for letter, tile in schedule.tiles}
    if device.kind == "cpu" or (needed := accumulator_registers(chain, schedule.program(chain), blocks)) <= limit:
        return None
    return f"needs {needed} registers for sums, above {limit}"


def _lifetime(chain: Chain, statements: list[tuple[Statement, Path]], value: str) -> tuple[int, int]:
    """Indices of the first and the last statement around which a value's accumulator exists."""
    held = {Statement("C", value), *uses(chain, value)}
    over = product_of(chain, value).over
    own = dict(statements)[Statement("C", value)]
    start = own[: next((depth for depth, loop in enumerate(own) if loop.letter == over), len(own))]
    shared = min(num_shared(start, path) for use, path in statements if use in held)
    # What is used inside of a loop that the others are outside of exists as long as that loop turns.
    loops = [path[shared] for use, path in statements if use in held and len(path) > shared]
    found = [i for i, (use, path) in enumerate(statements) if use in held or (path[shared:] and path[shared] in loops)]
    return min(found), max(found)
