"""The rules that make a search space small, one function each: a reason to drop a candidate, or None.

Rules 1 and 2 and the two on legality look at a program's loops, rules 3 and 4 at tile sizes, the last at a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from fusion.plan.chain import Chain
from fusion.plan.device import Device
from fusion.plan.expression import Expression
from fusion.plan.placement import Program, live_tiles, num_shared
from fusion.plan.schedule import Schedule
from fusion.plan.stages import Elementwise, MatMul, Softmax, operands
from fusion.plan.statements import Statement
from fusion.plan.traffic import skeleton

GRANULE = 16  # tile sizes are its multiples: what tensor cores take
MAX_PADDING = 0.05
SHARED_SLACK = 1.2  # the paper's: a back end may need less than the estimate
SharedBytes = Callable[[Chain, Schedule, Device], int]


@dataclass(frozen=True)
class ExpressionClass:
    """Expressions whose blocks run the same program while all loops turn; the first one stands for all.

    Source: MCFuser (arXiv:2506.22169), rule 1.
    """

    program: Program
    members: tuple[Expression, ...]

    @property
    def representative(self) -> Expression:
        """The one that is kept."""
        return self.members[0]


def expression_classes(chain: Chain, expressions: Iterable[Expression]) -> tuple[ExpressionClass, ...]:
    """Expressions grouped by the program of a block.

    Args:
        chain: What is computed.
        expressions: Some of its tiling expressions.

    Returns:
        The classes, and the members of each, in the given order: 5 for the 26 expressions of two products.

    Source: MCFuser (arXiv:2506.22169), rule 1; which loops are spread over blocks is our reading, see `grid_loops`.
    """
    classes: dict[Program, list[Expression]] = {}
    for expression in expressions:
        classes.setdefault(skeleton(chain, expression, chain.loops), []).append(expression)
    return tuple(ExpressionClass(program, tuple(members)) for program, members in classes.items())


def same_program(expression: Expression, classes: Iterable[ExpressionClass]) -> str | None:
    """Rule 1: another expression that stands for the same program is kept instead.

    Args:
        expression: A member of one of the classes.
        classes: Of all expressions.

    Source: MCFuser (arXiv:2506.22169), rule 1.
    """
    kept = next(group.representative for group in classes if expression in group.members)
    return None if kept == expression else f"a block runs the same program as that of {kept}"


def partial_tiles(chain: Chain, program: Program) -> str | None:
    """Rule 2: several incomplete tiles of an intermediate would have to stay on chip at once.

    Args:
        chain: What is computed.
        program: Of an expression, all of its loops turning.

    Source: MCFuser (arXiv:2506.22169), rule 2. That only intermediates count is ours: it leaves three expressions
        of two products, as in the paper, one of which keeps several tiles of the output.
    """
    live = live_tiles(program, chain)
    found = [f"all tiles of {value} along {live[value].lower()}" for value in chain.intermediates if live[value]]
    return f"{' and '.join(found)} would stay on chip at once" if found else None


def repeated_finish(chain: Chain, program: Program) -> str | None:
    """A finish changes its value in place, so it must run once for each time that the sum is computed.

    Args:
        chain: What is computed.
        program: Any of it.

    Source: our definition (the paper has no stages between products).
    """
    paths = dict(program.walk())
    for statement, loops in paths.items():
        if statement.kind == "F":
            shared = num_shared(loops, paths[Statement("C", statement.tensor)])
            again = [loop.letter for loop in loops[shared:] if loop.letter not in chain.tensors[statement.tensor]]
            if again:
                return f"{statement} would run again in every round of {again[0].lower()}"
    return None


def split_softmax(chain: Chain, program: Program) -> str | None:
    """A softmax whose loop turns needs a product behind it that keeps its running maximum and sum.

    Args:
        chain: What is computed.
        program: Any of it.

    Source: our definition (the paper fuses self-attention but does not state when a softmax may be split).
    """
    paths, blocks = dict(program.walk()), {letter for letter, extent in program.grid if extent > 1}
    for stage in chain.stages:
        if isinstance(stage, Softmax):
            loops = paths[Statement("F", stage.x)]
            if stage.over not in blocks and all(loop.letter != stage.over for loop in loops):
                continue
            reader = online_reader(chain, stage)
            path = paths[Statement("C", reader)] if reader else ()
            shared = loops[: num_shared(loops, path)]
            if all(loop.letter != stage.over for loop in shared):
                return f"softmax of {stage.x} over {stage.over}: {stage.over.lower()} must be a single tile"
            again = [loop.letter for loop in loops if all(loop.letter != other.letter for other in path)]
            if again:
                return f"softmax of {stage.x} over {stage.over} would run again in every round of {again[0].lower()}"
    return None


def online_reader(chain: Chain, softmax: Softmax) -> str | None:
    """The product that can finish a softmax: it sums over the softmax's letter and is the value's only reader.

    Args:
        chain: What is computed.
        softmax: One of its stages.

    Returns:
        Name of its value, or None: also where something else than `mul` stands between, which a later rescaling of the
        sums would not commute with.

    Source: our definition (online softmax is not in the paper).
    """
    behind = chain.stages[chain.stages.index(softmax) + 1 :]
    stages = [stage for stage in behind if not isinstance(stage, MatMul) and stage.x == softmax.x]
    readers = [stage for stage in behind if softmax.x in operands(stage)]
    if not all(isinstance(stage, Elementwise) and stage.operation == "mul" for stage in stages) or len(readers) != 1:
        return None
    match readers[0]:
        case MatMul(out, left, right, over) if over == softmax.over and left != right:
            return out
    return None


def tile_sizes(size: int) -> range:
    """The paper's tile sizes of a dimension: multiples of 16, up to the first one that holds all of it.

    Args:
        size: Of the dimension.

    Source: MCFuser (arXiv:2506.22169), search space.
    """
    return range(GRANULE, _round_up(max(size, 1), GRANULE) + 1, GRANULE)


def padding_ratio(size: int, tile: int) -> float:
    """What whole tiles add to a dimension, relative to it.

    Args:
        size: Of the dimension, at least 1.
        tile: Tile size.

    Source: MCFuser (arXiv:2506.22169), rule 3; dividing by the size, not the padded size, is our reading.
    """
    return (_round_up(size, tile) - size) / size


def padding(size: int, tile: int) -> str | None:
    """Rule 3: whole tiles add 5 % or more to a dimension, and another tile size adds less.

    Args:
        size: Of the dimension.
        tile: A multiple of 16.

    Source: MCFuser (arXiv:2506.22169), rule 3; that the least padding is always accepted is ours, for small odd sizes.
    """
    size = max(size, 1)
    ratio, least = padding_ratio(size, tile), padding_ratio(size, tile_sizes(size)[-1])
    if ratio < MAX_PADDING or ratio == least:
        return None
    return f"tiles of {tile} add {ratio:.1%} to {size}"


def loaded_operands(chain: Chain) -> tuple[tuple[str, str], ...]:
    """The two loops of every input that a product reads: the tiles that rule 4 counts.

    Args:
        chain: Any.

    Source: MCFuser (arXiv:2506.22169), rule 4. Not to count the values is our reading: their tiles are in registers,
        and it fits the share that the paper drops.
    """
    loops, found = chain.loops, []
    read = {name for product in chain.products for name in operands(product)}
    for tensor in chain.inputs:
        if tensor.name in read:
            first, second = (letter for letter in tensor.dims if letter in loops)
            found.append((first, second))
    return tuple(found)


def limit_entries(chain: Chain, device: Device) -> int:
    """The most entries that those tiles may have together: 1.2 times the shared memory of a block.

    Args:
        chain: Whose dtype sets the bytes of an entry.
        device: Whose shared memory.

    Source: MCFuser (arXiv:2506.22169), rule 4.
    """
    return int(SHARED_SLACK * device.shared_bytes_per_block) // chain.item_bytes


def shared_estimate(chain: Chain, tiles: Mapping[str, int], device: Device) -> str | None:
    """Rule 4: the tiles of the products' inputs are too large for the shared memory of a block.

    Args:
        chain: What is computed.
        tiles: Letter -> tile size of every loop.
        device: Whose shared memory.

    Source: MCFuser (arXiv:2506.22169), rule 4.
    """
    entries = sum(tiles[first] * tiles[second] for first, second in loaded_operands(chain))
    limit = limit_entries(chain, device)
    return f"tiles of {entries} entries, above {limit}" if entries > limit else None


def shared_limit(chain: Chain, schedule: Schedule, device: Device, shared_bytes: SharedBytes) -> str | None:
    """The kernel of a schedule asks for more shared memory than the device gives a block.

    Args:
        chain: What is computed.
        schedule: Expression, tiles, warps and stages.
        device: Whose shared memory.
        shared_bytes: What the kernel of (chain, schedule) asks for on a device.

    Source: not in the paper, which finds out when it measures.
    """
    needed = shared_bytes(chain, schedule, device)
    limit = device.shared_bytes_per_block
    return f"needs {needed} bytes of shared memory, above {limit}" if needed > limit else None


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
