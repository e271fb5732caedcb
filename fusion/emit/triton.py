"""A chain and a schedule -> the text of one Triton kernel.

Source: MCFuser (arXiv:2506.22169), which lowers a schedule to Triton too, through TVM.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from fusion.emit.nest import INDENT, Nest
from fusion.emit.softmax import online_softmaxes
from fusion.emit.statements import StatementText
from fusion.emit.tiles import At, Tiles
from fusion.plan.chain import Chain
from fusion.plan.placement import Program, live_tiles
from fusion.plan.prune import repeated_finish, split_softmax
from fusion.plan.schedule import Schedule
from fusion.plan.stages import Softmax


@dataclass(frozen=True)
class Kernel:
    """A kernel as text, and what it takes to launch it.

    Source: not in the paper.
    """

    name: str
    """Of the function."""
    source: str
    """Of the module that holds it."""
    tensors: tuple[tuple[str, str], ...]
    """Name and letters of every tensor that it takes, in order: inputs, output, and last the log-sum-exp if saved."""
    fp32: frozenset[str]
    """Names of those that it writes in fp32, whatever the chain's dtype."""
    programs: int
    """Size of the grid, which has one dimension."""
    num_warps: int
    num_stages: int

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of its arguments in order: a pointer for each tensor, then a stride in elements for each letter."""
        pointers = tuple(f"{name}_ptr" for name, _ in self.tensors)
        return pointers + tuple(f"{name}_{letter}_stride" for name, letters in self.tensors for letter in letters)


def emit(
    chain: Chain, schedule: Schedule, *, exact: bool = False, save_lse: bool = False, upcast: bool = False
) -> Kernel:
    """The kernel of a schedule.

    Sums are kept in fp32, and a value is rounded to the chain's dtype only as the operand of a product or as the
    output. Sizes are constants of the kernel; strides are arguments.

    Args:
        chain: What to compute.
        schedule: How; one of the chain's.
        exact: Whether to write the output in fp32, as it is before it is rounded to the chain's dtype.
        save_lse: Whether to write the natural logarithm of the sum of exponents of the chain's one softmax too, fp32,
            over the batch's letters and the rows': what a backward pass needs. Rows without an entry have -inf.
        upcast: Whether products of fp16 and bf16 are taken in fp32: Triton's interpreter has no product in bf16.

    Returns:
        The kernel.

    Raises:
        ValueError: The schedule is not legal: it repeats stages in place, or splits a softmax that cannot be online. Or
            save_lse without one softmax.

    Source: MCFuser (arXiv:2506.22169), section on code generation; what the text looks like is ours.
    """
    program = schedule.program(chain)
    reason = repeated_finish(chain, program) or split_softmax(chain, program)
    if reason is not None:
        raise ValueError(f"schedule={schedule}: {reason}; take one that fusion.plan.prune accepts")
    lse = _lse(chain) if save_lse else ()
    tensors = (*((x.name, x.dims) for x in chain.inputs), (chain.output, chain.tensors[chain.output]), *lse)
    fp32 = frozenset([*(name for name, _ in lse), *([chain.output] if exact else [])])
    tiles = Tiles(
        chain, {**chain.tensors, **dict(lse)}, dict(schedule.tiles), live_tiles(program, chain), _fixed(chain, program)
    )
    text = StatementText(
        tiles, online_softmaxes(chain, program), _summed(chain, program), lse[0][0] if lse else "", exact, upcast
    )
    nest = Nest(tiles, program, text)
    name = "_".join(["fused", *(product.out for product in chain.products)])
    programs = math.prod(_blocks(chain, program).values())
    kernel = Kernel(name, "", tensors, fp32, programs, schedule.num_warps, schedule.num_stages)
    return replace(kernel, source="\n".join(_module(kernel, schedule, nest)) + "\n")


def _module(kernel: Kernel, schedule: Schedule, nest: Nest) -> Iterator[str]:
    chain, program = nest.tiles.chain, nest.program
    yield f'"""{chain}\n\n{schedule}\n{program}\n"""\n'
    yield "import triton\nimport triton.language as tl\n\n"
    yield "@triton.jit"
    yield f"def {kernel.name}("
    yield from (f"{INDENT}{argument}," for argument in kernel.arguments)
    yield "):"
    at, lines = _indices(chain, program, nest.tiles)
    lines += [line for name, _ in kernel.tensors for line in nest.tiles.addresses(name, at)]
    yield from (INDENT + line for line in lines)
    yield from (INDENT + line for line in nest.body(program.body, at))


def _indices(chain: Chain, program: Program, tiles: Tiles) -> tuple[At, list[str]]:
    """Where a block's tiles are, and the lines that find out."""
    at: dict[str, int | str] = dict.fromkeys(chain.sizes, 0)
    lines = ["block = tl.program_id(0)"]
    inner = 1
    for letter, extent in reversed(_blocks(chain, program).items()):
        if extent > 1:
            name = letter.lower()
            index = f"{f'block // {inner}' if inner > 1 else 'block'} % {extent}"
            batch = letter in chain.batch
            lines.append(
                f"{name} = tl.cast({index}, tl.int64)" if batch else f"{name} = {index} * {tiles.sizes[letter]}"
            )
            at[letter] = name
            inner *= extent
    lines += [f"i_{letter} = tl.arange(0, {tiles.block(letter)})" for letter in chain.loops]
    return at, lines


def _blocks(chain: Chain, program: Program) -> dict[str, int]:
    """Letter -> how many blocks it is spread over; the last one turns fastest."""
    return {letter: chain.sizes[letter] for letter in chain.batch} | dict(program.grid)


def _summed(chain: Chain, program: Program) -> frozenset[str]:
    """Values around whose product its own sum turns."""
    turning = {x.tensor: {loop.letter for loop in loops} for x, loops in program.walk() if x.kind == "C"}
    return frozenset(product.out for product in chain.products if product.over in turning[product.out])


def _fixed(chain: Chain, program: Program) -> str:
    return "".join(_blocks(chain, program))


def _lse(chain: Chain) -> tuple[tuple[str, str], ...]:
    """Name and letters of the log-sum-exp of the one softmax."""
    softmaxes = [stage for stage in chain.stages if isinstance(stage, Softmax)]
    if len(softmaxes) != 1:
        raise ValueError(f"save_lse=True needs a chain with one softmax; this one has {len(softmaxes)}")
    name = "lse"
    while name in chain.tensors:
        name += "_"
    return ((name, chain.tensors[softmaxes[0].x].replace(softmaxes[0].over, "")),)
