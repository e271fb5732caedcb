"""A chain and a schedule -> the text of one C++ kernel.

Source: MCFuser (arXiv:2506.22169) lowers schedules to GPUs; kernels for CPUs are not in the paper.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from fusion.emit.causal import vanishing
from fusion.emit.cpp.nest import Nest
from fusion.emit.cpp.statements import INDENT, StatementText, packed_index
from fusion.emit.cpp.storage import Storage
from fusion.emit.softmax import online_softmaxes
from fusion.plan.chain import Chain
from fusion.plan.packing import packed_operands
from fusion.plan.placement import Program, live_tiles
from fusion.plan.prune import repeated_finish, split_softmax
from fusion.plan.schedule import Schedule
from fusion.plan.stages import Softmax


@dataclass(frozen=True)
class Kernel:
    """A kernel as text, and what it takes to call it.

    Source: not in the paper.
    """

    name: str
    """Of the function; `<name>_floats` tells how large a workspace it needs."""
    source: str
    tensors: tuple[tuple[str, str], ...]
    """Name and letters of every tensor that it takes, in order: inputs, output, and last the log-sum-exp if saved."""
    fp32: frozenset[str]
    """Names of those that it writes in fp32, whatever the chain's dtype."""
    num_inputs: int
    limits: tuple[tuple[str, int], ...]
    """Letter and largest size of dimensions that have to be one tile; all other sizes are free."""


def emit(chain: Chain, schedule: Schedule, *, exact: bool = False, save_lse: bool = False, suffix: str = "") -> Kernel:
    """The kernel of a schedule.

    Sums are kept in fp32, and a value is rounded to the chain's dtype only as the operand of a product or as the
    output. Sizes and strides are arguments.

    Args:
        chain: What to compute.
        schedule: How; one of the chain's.
        exact: Whether to write the output in fp32, as it is before it is rounded to the chain's dtype.
        save_lse: Whether to write the natural logarithm of the sum of exponents of the chain's one softmax too, fp32,
            over the batch's letters and the rows'. Rows without an entry have -inf.
        suffix: Of the function's name: kernels that are compiled together have different ones.

    Returns:
        The kernel.

    Raises:
        ValueError: The schedule is not legal, or save_lse without one softmax.
        OrientationError: Readers of a value want it stored in different ways.

    Source: not in the paper.
    """
    program = schedule.program(chain)
    reason = repeated_finish(chain, program) or split_softmax(chain, program)
    if reason is not None:
        raise ValueError(f"schedule={schedule}: {reason}; take one that fusion.plan.prune accepts")
    lse = _lse(chain) if save_lse else ()
    tensors = (*((x.name, x.dims) for x in chain.inputs), (chain.output, chain.tensors[chain.output]), *lse)
    fp32 = frozenset([*(name for name, _ in lse), *([chain.output] if exact else [])])
    letters, live = {**chain.tensors, **dict(lse)}, live_tiles(program, chain)
    packings = packed_operands(chain, program)
    tiles, turning = dict(schedule.tiles), _turning(program)
    storage = Storage(chain, letters, tiles, turning, live, schedule.micro[1], packings, fp32)
    around = {x.tensor: {loop.letter for loop in loops} for x, loops in program.walk() if x.kind == "C"}
    summed = frozenset(product.out for product in chain.products if product.over in around[product.out])
    text = StatementText(storage, online_softmaxes(chain, program), summed, schedule.micro, lse[0][0] if lse else "")
    name = "_".join(["fused", *(product.out for product in chain.products)]) + suffix
    limits = tuple((letter, tile) for letter, tile in schedule.tiles if letter not in storage.turning)
    kernel = Kernel(name, "", tensors, fp32, len(chain.inputs), limits)
    source = "\n".join(_Module(kernel, schedule, Nest(storage, program, text)).lines()) + "\n"
    return replace(kernel, source=source)


@dataclass(frozen=True)
class _Module:
    kernel: Kernel
    schedule: Schedule
    nest: Nest

    def lines(self) -> Iterator[str]:
        chain, name = self.nest.storage.chain, self.kernel.name
        yield f"// {_without_sizes(chain)}\n// {self.schedule}\n// {self.nest.program}"
        yield '#include <omp.h>\n#include "softmax.h"\n#include "tiles.h"\n'
        yield "using namespace fusion;\n"
        yield f'extern "C" int64_t {name}_floats(const int64_t* numbers, int64_t num_threads) {{'
        yield from (INDENT + line for line in self._numbers(strides=False))
        yield f"{INDENT}return {' + '.join([*self._packed_total(), 'num_threads * scratch_floats'])};"
        yield "}\n"
        yield (
            f'extern "C" void {name}(void* const* tensors, const int64_t* numbers, float* workspace, '
            "int64_t num_threads) {"
        )
        yield from (INDENT + line for line in self._setup())
        yield f"{INDENT}#pragma omp parallel num_threads(num_threads)"
        yield f"{INDENT}{{"
        yield from (INDENT * 2 + line for line in self._thread())
        yield f"{INDENT}}}\n}}"

    def _numbers(self, *, strides: bool) -> Iterator[str]:
        """Sizes, strides, and how much is packed and kept in scratch."""
        storage = self.nest.storage
        letters = list(storage.chain.sizes)
        yield f"[[maybe_unused]] constexpr int64_t {', '.join(f'{x}_tile = {n}' for x, n in self.schedule.tiles)};"
        yield f"[[maybe_unused]] const int64_t {', '.join(f'{x}_size = numbers[{i}]' for i, x in enumerate(letters))};"
        if strides:
            names = [f"{name}_{letter}" for name, own in self.kernel.tensors for letter in own]
            found = [f"{x} = numbers[{i}]" for i, x in enumerate(names, len(letters))]
            if found:
                yield f"[[maybe_unused]] const int64_t {', '.join(found)};"
        turning = {letter for letters in storage.live.values() for letter in letters}
        for letter in sorted(turning | {letter for letter, _ in self.nest.program.grid} | set(storage.turning)):
            yield (
                f"[[maybe_unused]] const int64_t {letter}_tiles = ({letter}_size + {letter}_tile - 1) / {letter}_tile;"
            )
        for name in storage.packed:
            column, over = storage.packings[name].column, storage.packings[name].over
            yield f"const int64_t {name}_packed_floats = ({column}_size + W - 1) / W * W * {storage.depth(over)};"
        yield f"const int64_t scratch_floats = {' + '.join([*(size for _, size in self._scratch())])};"

    def _scratch(self) -> Iterator[tuple[str, str]]:
        """Tiles, and the rows of softmaxes; each starts on a line of the cache."""
        storage, text = self.nest.storage, self.nest.text
        yield from storage.buffers()
        for stage in storage.chain.stages:
            if isinstance(stage, Softmax):
                rows = -(-storage.sizes[storage.row(stage.x)] // 16) * 16
                online = text.online.get(stage.x)
                tiles = [f"{letter}_tiles" for letter in (online.inner if online else "")]
                for kind in ("peak", "total", "factor"):
                    yield f"{stage.x}_{kind}", " * ".join([str(rows), *tiles])

    def _packed_total(self) -> list[str]:
        storage = self.nest.storage
        return [
            " * ".join(
                [f"{name}_packed_floats", *(f"{x}_size" for x in storage.letters[name] if x in storage.chain.batch)]
            )
            for name in storage.packed
        ]

    def _setup(self) -> Iterator[str]:
        storage = self.nest.storage
        yield from self._numbers(strides=True)
        for index, (name, _) in enumerate(self.kernel.tensors):
            const = "const " if any(name == tensor.name for tensor in storage.chain.inputs) else ""
            kind = storage.type_of(name)
            yield f"{const}{kind}* const {name}_data = static_cast<{const}{kind}*>(tensors[{index}]);"
        end = "workspace"
        for name, total in zip(storage.packed, self._packed_total(), strict=True):
            line, end = self._carve(f"{name}_packed", storage.operand, end, total)
            yield line
        yield f"float* const scratch = {end};"

    def _thread(self) -> Iterator[str]:
        for name in self.nest.storage.packed:
            yield from self._pack(name)
        end = "scratch + omp_get_thread_num() * scratch_floats"
        for name, size in self._scratch():
            kind = self.nest.storage.operand if name.endswith("_wide") else "float"
            line, end = self._carve(name, kind, end, size)
            yield f"[[maybe_unused]] {line}"
        if self.nest.storage.in_unit:
            yield "const Unit unit;"
        yield from (f"static constexpr int64_t {x}_floats = {n};" for x, n in self._live_floats())
        blocks = self._blocks()
        yield "#pragma omp for schedule(dynamic)"
        count = " * ".join(extent for _, extent in blocks) or "1"
        yield f"for (int64_t block = 0; block < {count}; ++block) {{"
        yield from (INDENT + line for line in self._block(blocks))
        yield "}"

    @staticmethod
    def _carve(name: str, kind: str, start: str, floats: str) -> tuple[str, str]:
        """The line that lays entries of a kind into room for so many floats, and where that ends."""
        if kind == "float":
            return f"float* const {name} = {start};", f"{name} + {floats}"
        line = f"{kind}* const {name} = reinterpret_cast<{kind}*>({start});"
        return line, f"reinterpret_cast<float*>({name}) + {floats}"

    def _live_floats(self) -> Iterator[tuple[str, int]]:
        storage = self.nest.storage
        for value, letters in storage.live.items():
            if letters:
                yield value, storage.tile_floats(value)

    def _pack(self, name: str) -> Iterator[str]:
        """Lines that pack a right operand, its panels shared by the threads."""
        storage = self.nest.storage
        column, over = storage.packings[name].column, storage.packings[name].over
        batch = [letter for letter in storage.letters[name] if letter in storage.chain.batch]
        loops = [(letter, f"{letter}_size", "1") for letter in batch] + [(column, f"{column}_size", f"{column}_tile")]
        nv = storage.panel_vectors
        yield f"#pragma omp for collapse({len(loops) + 1}) schedule(static)"
        for letter, end, step in loops:
            yield f"for (int64_t {letter}_at = 0; {letter}_at < {end}; {letter}_at += {step})"
        yield f"for (int64_t p = 0; p < Panel::count({column}_tile / W, {nv}); ++p) {{"
        step, col = storage.stride(name, over), storage.stride(name, column)
        body = [
            f"const int64_t vectors = (std::min({column}_tile, {column}_size - {column}_at) + W - 1) / W;",
            f"if (p >= Panel::count(vectors, {nv})) continue;",
            f"const Panel panel(vectors, {nv}, p);",
            f"const int64_t start = {column}_at + panel.begin * W;",
            f"pack({storage.pointer(name, skip=over + column)} + start * {col}, {step}, {col}, {over}_size,",
            f"     {column}_size - start, panel.width,",
            f"     {name}_packed + {packed_index(storage, name)} + start * {storage.depth(over)});",
        ]
        yield from (INDENT + line for line in body)
        yield "}"

    def _blocks(self) -> list[tuple[str, str]]:
        """Letter and extent of what is spread over threads; the last one turns fastest."""
        chain = self.nest.storage.chain
        grid = [(letter, f"{letter}_tiles") for letter, extent in self.nest.program.grid if extent > 1]
        return [(letter, f"{letter}_size") for letter in chain.batch] + grid

    def _block(self, blocks: list[tuple[str, str]]) -> Iterator[str]:
        storage = self.nest.storage
        backwards = any(vanishing(storage.chain, value) for value in storage.scratch)
        if blocks:
            count = " * ".join(extent for _, extent in blocks)
            yield f"int64_t rest = {f'{count} - 1 - block' if backwards else 'block'};"
        for letter, extent in reversed(blocks):
            at = f"rest % {extent}" + ("" if letter in storage.chain.batch else f" * {letter}_tile")
            yield f"const int64_t {letter}_at = {at};"
            if letter not in storage.chain.batch:
                yield f"const int64_t {letter}_len = std::min({letter}_tile, {letter}_size - {letter}_at);"
            yield f"rest /= {extent};"
        for letter in storage.chain.loops:
            if letter not in storage.turning:
                yield f"[[maybe_unused]] const int64_t {letter}_at = 0, {letter}_len = {letter}_size;"
        yield from self.nest.body(self.nest.program.body)


def _turning(program: Program) -> str:
    letters = [letter for letter, extent in program.grid if extent > 1]
    return "".join(dict.fromkeys([*letters, *(loop.letter for _, loops in program.walk() for loop in loops)]))


def _lse(chain: Chain) -> tuple[tuple[str, str], ...]:
    """Name and letters of the log-sum-exp of the one softmax."""
    softmaxes = [stage for stage in chain.stages if isinstance(stage, Softmax)]
    if len(softmaxes) != 1:
        raise ValueError(f"save_lse=True needs a chain with one softmax; this one has {len(softmaxes)}")
    name = "lse"
    while name in chain.tensors:
        name += "_"
    return ((name, chain.tensors[softmaxes[0].x].replace(softmaxes[0].over, "")),)


def _without_sizes(chain: Chain) -> str:
    return str(chain).rpartition(" | ")[0].rpartition(" | ")[0] + f" | {chain.dtype}"
