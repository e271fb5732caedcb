"""The time of a schedule on a CPU: what its register blocks take, what stands between products, what memory adds.

A core keeps MR x NV sums in registers. A step along the depth costs what the busiest unit takes: multiplications two a
cycle, loads two a cycle, and four cycles if the sums are too few to hide a multiplication's latency. The paper's model,
bytes and flops alone, does not see this and ranks kernels of a CPU no better than chance.

    t = (blocks of registers + passes over tiles + packing) * imbalance,  at least the bytes over the bandwidth

Source: not in the paper, whose model is for GPUs; the term of the register block is our measurement.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from fusion.plan import matrix_unit
from fusion.plan.chain import Chain
from fusion.plan.device import Device
from fusion.plan.orientation import columns
from fusion.plan.packing import Packing, packed_operands
from fusion.plan.performance_model import Prediction
from fusion.plan.placement import Program, live_tiles
from fusion.plan.schedule import Schedule
from fusion.plan.stages import Causal, Elementwise, Softmax
from fusion.plan.statements import product_of
from fusion.plan.traffic import Repeats, compute_letters, repeats, rounds_of, skeleton

MICRO_KERNELS = ((6, 4), (8, 3), (8, 2), (12, 2))  # rows and vectors of columns; with operands, 32 registers hold each
FMA_LATENCY_CYCLES = 4
CALL_CYCLES = 12  # of a block of registers, beside loading and storing its sums
ROW_CYCLES = 12  # of a pass over a tile's row
SOFTMAX_ROW_CYCLES = 30  # reductions of a row, and the correction
TURN_CYCLES, COPY_CYCLES = 6, 2  # of packing a vector whose entries lie apart, and one that lies as it is wanted
FAR_READ_CYCLES, FAR_PACKED_CYCLES = 8, 44  # beside that, if it is not in a near cache; the latter to write it, too
LOAD_COST = 0.12  # of a load beside a multiplication, in cycles: a core does not overlap them quite
TASK_CYCLES = 600  # of a block: what handing it to a thread costs
STAGE_CYCLES = {"add": 1.0, "mul": 1.0, "mask": 2.0, "relu": 1.0, "exp_minus": 14.0, "relu_grad": 2.0}
FUNCTION_CYCLES = 22.0  # of an activation or the derivative of one
EXP_CYCLES = 12.0
CUT_ENTRIES = 35  # of a row, computed though they are masked: half of a register block
FP32_BYTES, BF16_BYTES = 4, 2
VALUE_PASSES = 3
NEAR_BYTES_PER_CYCLE = 64  # of a core's second cache
FAR_SHARE = 0.1  # of what is read again, that comes from memory and not from the cores' common cache

ProductCycles = Callable[[int, int, int, int], float]
"""Rows, columns and depth of a product of tiles, and how many tiles of its value are kept -> its cycles."""


def step_cycles(rows: int, vectors: int) -> float:
    """Cycles of one step along the depth of a block of registers.

    Args:
        rows: Of the block.
        vectors: Of its columns.

    Source: our measurement (see the module).
    """
    fma, load = rows * vectors / 2, (rows + vectors) / 2
    return max(fma + LOAD_COST * (rows + vectors), load, FMA_LATENCY_CYCLES)


def best_micro(chain: Chain, schedule: Schedule, device: Device) -> tuple[int, int]:
    """The register block that suits a schedule's tiles best, by the model.

    Args:
        chain: What is computed.
        schedule: Expression and tiles; its own block does not count.
        device: Of a CPU.

    Source: not in the paper.
    """
    tiles, width = dict(schedule.tiles), device.warp_size
    return min(
        MICRO_KERNELS, key=lambda micro: sum(_tile_cycles(*shape, micro, width) for shape in _shapes(chain, tiles))
    )


@dataclass(frozen=True)
class _Terms:
    """What an expression and the loops that turn decide."""

    program: Program
    repeats: tuple[Repeats, ...]
    packings: Mapping[str, Packing]
    live: Mapping[str, str]

    def num_live(self, value: str, rounds: Mapping[str, int]) -> int:
        """How many tiles of a value are kept at once."""
        return math.prod(rounds[letter] for letter in self.live.get(value, ""))


class CpuModel:
    """The model of a chain on a CPU; what expressions and turning loops decide is worked out once for each."""

    def __init__(self, chain: Chain, device: Device) -> None:
        """Of a chain on a device of kind cpu."""
        self.chain, self.device = chain, device
        self._sizes = {letter: max(size, 1) for letter, size in chain.sizes.items()}
        self._terms: dict[tuple[object, str], _Terms] = {}

    def predict(self, schedule: Schedule) -> Prediction:
        """The time of a schedule.

        Args:
            schedule: Of the chain; it is run with the register block that suits it best.

        Returns:
            The prediction: what memory takes and what the cores take, of which the larger counts.
        """
        chain, tiles = self.chain, dict(schedule.tiles)
        rounds = rounds_of(chain, tiles)
        turning = "".join(letter for letter in chain.loops if rounds[letter] > 1)
        key = schedule.expression, turning
        if key not in self._terms:
            program = skeleton(chain, schedule.expression, turning)
            packings, live = packed_operands(chain, program), live_tiles(program, chain)
            self._terms[key] = _Terms(program, repeats(chain, program), packings, live)
        terms = self._terms[key]
        in_unit = self.device.arch == "amx" and matrix_unit.suits(chain, tiles, turning)
        product = self._in_unit(tiles, rounds, terms) if in_unit else self._in_registers(schedule)
        cycles, moved_bytes = sum(self._packing_cycles(*x, rounds, in_unit) for x in terms.packings.items()), 0.0
        for repeat in terms.repeats:
            cycles += self._cycles(repeat, tiles, rounds, product, terms.num_live(repeat.statement.tensor, rounds))
            moved_bytes += self._far_bytes(repeat, tiles, rounds)
        blocks = math.prod(chain.sizes[letter] for letter in chain.batch)
        for letter, extent in terms.program.grid:
            blocks *= rounds[letter] if extent > 1 else 1
        cycles += blocks * TASK_CYCLES
        cores = self.device.num_sms
        slowdown = -(-blocks // cores) * cores / blocks if blocks else 1.0
        compute_us = 1e6 * cycles / (self._cycles_per_s * cores)
        memory_us = max(0.0, 1e6 * moved_bytes / self.device.dram_bytes_per_s)
        return Prediction(memory_us, compute_us, blocks, slowdown)

    @cached_property
    def _cycles_per_s(self) -> float:
        """Of one core: it multiplies and adds two vectors a cycle."""
        return self.device.fp32_flops_per_s / self.device.num_sms / (4 * self.device.warp_size)

    @property
    def _room_bytes(self) -> float:
        """Of a core's second cache, for one of the things that it holds."""
        return self.device.shared_bytes_per_block / 2

    def _in_registers(self, schedule: Schedule) -> ProductCycles:
        """Cycles of a product of tiles by the register block that suits a schedule best."""
        micro, width = best_micro(self.chain, schedule, self.device), self.device.warp_size

        def cycles(rows: int, cols: int, depth: int, num_live: int) -> float:
            return _tile_cycles(rows, cols, depth, micro, width) + self._far_cycles(rows, cols, depth, micro, num_live)

        return cycles

    def _in_unit(self, tiles: Mapping[str, int], rounds: Mapping[str, int], terms: _Terms) -> ProductCycles:
        """Cycles of a product of tiles by the matrix unit, beside all tiles of a block."""
        held_bytes = 0
        for product in self.chain.products:
            rows, cols, depth = self._clipped(_shape(self.chain, product.out), tiles)
            held_bytes += FP32_BYTES * rows * cols * terms.num_live(product.out, rounds) + BF16_BYTES * rows * depth
        far = matrix_unit.far_share(held_bytes, self.device.shared_bytes_per_block)
        return lambda rows, cols, depth, _: matrix_unit.cycles(rows, cols, depth, far)

    def _cycles(
        self,
        repeat: Repeats,
        tiles: Mapping[str, int],
        rounds: Mapping[str, int],
        product: ProductCycles,
        num_live: int,
    ) -> float:
        """Of a statement; several tiles of its value may be kept."""
        chain, statement = self.chain, repeat.statement
        times = math.prod(rounds[letter] for letter in repeat.around)
        if statement.kind == "C":
            shape = self._clipped(_shape(chain, statement.tensor), tiles)
            return times * self._kept(statement.tensor) * product(*shape, num_live)
        if statement.kind == "F":
            rows, cols, _ = self._clipped(_shape(chain, statement.tensor), tiles)
            cost, row_cost = _pass_cycles(chain, statement.tensor)
            vectors = math.ceil(cols / self.device.warp_size)
            return times * self._kept(statement.tensor) * rows * (row_cost + cost * vectors)
        return 0.0

    def _packing_cycles(self, name: str, packing: Packing, rounds: Mapping[str, int], in_unit: bool) -> float:
        """Of an operand, over all of its readers or once before them; a vector of the unit holds pairs."""
        chain, vector_bytes = self.chain, FP32_BYTES * self.device.warp_size
        vectors = math.prod(chain.shape(name)) / self.device.warp_size / (2 if in_unit else 1)
        cycles: float = COPY_CYCLES if chain.tensors[name][-1] == packing.column else TURN_CYCLES
        is_far, by_panel = vectors * vector_bytes > self._room_bytes, packing.by_panel(rounds)
        if is_far:
            cycles += FAR_READ_CYCLES if by_panel else FAR_PACKED_CYCLES
        return vectors * cycles * (packing.times_read(rounds) if by_panel else 1)

    def _far_cycles(self, rows: int, cols: int, depth: int, micro: tuple[int, int], num_live: int) -> float:
        """What it adds that tiles are far: panels pass by for each block of rows, values three times.

        A left operand passes by for each panel, but it is read along its rows and fetched ahead.
        """
        panel_bytes = FP32_BYTES * min(cols, micro[1] * self.device.warp_size) * depth
        value_bytes = FP32_BYTES * rows * cols
        far_bytes = 0.0
        if panel_bytes > self._room_bytes:
            far_bytes += FP32_BYTES * cols * depth * (math.ceil(rows / micro[0]) - 1)
        if value_bytes * num_live > self._room_bytes:
            far_bytes += value_bytes * VALUE_PASSES
        return far_bytes / matrix_unit.FAR_BYTES_PER_CYCLE + value_bytes * VALUE_PASSES / NEAR_BYTES_PER_CYCLE

    def _clipped(self, shape: tuple[str, str, str], tiles: Mapping[str, int]) -> tuple[int, int, int]:
        row, column, over = (min(tiles[letter], self._sizes[letter]) for letter in shape)
        return row, column, over

    def _kept(self, value: str) -> float:
        """The share of a value's tiles that a causal mask leaves, its own or that of what it sums over."""
        share = 1.0
        for stage in self.chain.stages:
            if isinstance(stage, Causal) and {stage.row, stage.column} <= set(compute_letters(self.chain, value)):
                row, column = self._sizes[stage.row], self._sizes[stage.column]
                share = min(share, (row / 2 + max(stage.diagonal, 0) + CUT_ENTRIES) / column)
        return share

    def _far_bytes(self, repeat: Repeats, tiles: Mapping[str, int], rounds: Mapping[str, int]) -> float:
        """Bytes from memory: what a core's cache does not keep from one round to the next is read again."""
        statement = repeat.statement
        if statement.kind not in "LS":
            return 0.0
        size = self.chain.num_bytes(statement.tensor)
        again = math.prod(rounds[letter] for letter in repeat.again)
        stays = size / max(
            math.prod(self.chain.sizes[x] for x in self.chain.batch if x in self.chain.tensors[statement.tensor]), 1
        )
        return float(size * (1 if stays <= self.device.shared_bytes_per_block else 1 + (again - 1) * FAR_SHARE))


def _shapes(chain: Chain, tiles: Mapping[str, int]) -> list[tuple[int, int, int]]:
    sizes = chain.sizes
    return [
        (row, column, over)
        for product in chain.products
        for row, column, over in [
            tuple(min(tiles[letter], max(sizes[letter], 1)) for letter in _shape(chain, product.out))
        ]
    ]


def _shape(chain: Chain, value: str) -> tuple[str, str, str]:
    """Letters of a value's rows and columns, and the one that it sums over."""
    column = columns(chain)[value]
    row = next(letter for letter in chain.tensors[value] if letter in chain.loops and letter != column)
    return row, column, product_of(chain, value).over


def _tile_cycles(rows: int, cols: int, depth: int, micro: tuple[int, int], width: int) -> float:
    """Cycles of a product of tiles, with the smaller blocks at its edges."""
    most_rows, most_vectors = micro
    vectors = math.ceil(cols / width)
    panels = math.ceil(vectors / most_vectors)
    cycles = 0.0
    for number, height in _heights(rows, most_rows):
        wide = vectors / panels
        cycles += (
            number
            * panels
            * (depth * step_cycles(height, math.ceil(wide)) * wide / math.ceil(wide) + CALL_CYCLES + 2 * height * wide)
        )
    return cycles


def _heights(rows: int, most: int) -> list[tuple[int, int]]:
    """How many blocks of each height, as the kernels cut rows."""
    found = []
    while rows and most:
        found.append((rows // most, most))
        rows, most = rows % most, 4 if most > 4 else most // 2
    return found


def _pass_cycles(chain: Chain, value: str) -> tuple[float, float]:
    """Cycles of a value's epilogue: for every vector, and for every row."""
    vector, row, changes = 0.0, 0.0, 0.0
    for stage in chain.epilogue(value):
        match stage:
            case Elementwise(operation=operation):
                changes += STAGE_CYCLES.get(operation, FUNCTION_CYCLES)
            case Causal():
                changes += 3.0
            case Softmax():
                vector += 2 * changes + EXP_CYCLES + 5.0
                row += SOFTMAX_ROW_CYCLES + ROW_CYCLES
                changes = 0.0
    if changes:
        vector, row = vector + changes + 2.0, row + ROW_CYCLES
    return vector, row
