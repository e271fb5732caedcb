"""Shared memory of an emitted kernel: what Triton's compiler puts there, and from when to when.

- The tile of an operand that is loaded in an innermost loop is copied ahead: num_stages - 1 buffers last as long as the
  loop, one more where products read it in place (warp groups). A tile with less than 4 bytes for every thread, or
  whose rows are not aligned, is not copied ahead.
- Any other operand is one buffer: on CUDA from its load to its last product, on HIP only while it passes on its way to
  registers. So does a right one that has to be transposed, but for warp groups.
- A value is a buffer where it cannot stay in registers from one product to the next: of one that is older than the
  loop that reads it, from before the loop on.
- The output passes through on its way to memory.
- What does not change in a loop is computed before it, but for products of warp groups.

The most that lies there at once is what the kernel asks for.

Source: not in the paper, whose estimate adds up the tiles of all operands; the rules are Triton 3.7's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod

from fusion.plan.chain import Chain
from fusion.plan.device import Device
from fusion.plan.dots import Dots
from fusion.plan.placement import Loop, is_written_out, live_tiles, statements_in
from fusion.plan.schedule import Schedule, block
from fusion.plan.stages import MatMul, operands
from fusion.plan.statements import Statement, epilogue_operands, product_of

ALIGNED_ENTRIES = 16  # a stride that is a multiple of it is known to be one
COPY_BYTES = 4  # the least that a thread copies ahead
PASSING_BYTES = 16  # of a thread at a time, on the way from one layout to another
OUTPUT_BYTES = 64  # likewise, on the way to memory


def allocated_bytes(chain: Chain, schedule: Schedule, device: Device) -> int:
    """Bytes of shared memory that a block of a schedule's kernel asks for.

    Args:
        chain: What is computed.
        schedule: Expression, tiles, warps and stages.
        device: Of the kind cuda or hip.

    Returns:
        The estimate.

    Source: not in the paper.
    """
    walk = _Walk(chain, schedule, device)
    walk.run(schedule.program(chain).body, None)
    changes = [(x.first, x.num_bytes) for x in walk.buffers] + [(x.last + 1, -x.num_bytes) for x in walk.buffers]
    return max(accumulate(change for _, change in sorted(changes)))


@dataclass
class _Buffer:
    num_bytes: int
    first: int
    last: int
    kept: bool
    """Whether it stays until its last use."""
    ahead: bool = False
    """Whether it is copied ahead."""


class _Walk:
    """Goes through a program in order and notes what comes to lie in shared memory."""

    def __init__(self, chain: Chain, schedule: Schedule, device: Device) -> None:
        self.chain, self.device, self.num_stages = chain, device, schedule.num_stages
        self.tiles = dict(schedule.tiles)
        self.threads = schedule.num_warps * device.warp_size
        program = schedule.program(chain)
        self.live = live_tiles(program, chain)
        shapes = {product.out: self._shape(product.out) for product in chain.products}
        self.dots = Dots(chain, device, schedule.num_warps, shapes, dict(self._bodies(program.body, ())))
        self.now = 0
        self.buffers: list[_Buffer] = []
        self.open: dict[str, _Buffer] = {}
        self.computed: set[str] = set()
        self.older: dict[str, int] = {}
        """Value that was computed before the open loop -> when that loop began."""

    def run(self, items: Sequence[Loop | Statement], innermost: Loop | None) -> None:
        for item in items:
            if isinstance(item, Statement):
                self._statement(item, innermost)
            elif is_written_out(item, self.chain, self.live):
                for _ in range(item.extent):
                    self.run(item.body, innermost)
            else:
                self._loop(item)

    def _loop(self, loop: Loop) -> None:
        body = list(loop.body)
        while body and self._is_invariant(body[0]):
            self.run([body.pop(0)], None)
        innermost = None if self._has_loop(loop.body) else loop
        self.now += 2
        start, before, outside = self.now, len(self.buffers), dict(self.open)
        self.older = dict.fromkeys(self.computed, start - 1)
        self.run(body, innermost)
        self.now += 1
        self.older = {}
        for buffer in outside.values():
            buffer.last = self.now if buffer.last >= start else buffer.last
        for buffer in self.buffers[before:]:
            if buffer.ahead and innermost is not None:
                buffer.first, buffer.last = start, self.now
            if buffer.kept and buffer.first < start:
                buffer.last = self.now
        self.open = outside

    def _statement(self, statement: Statement, innermost: Loop | None) -> None:
        self.now += 1
        match statement.kind:
            case "L":
                self._load(statement.tensor, innermost)
            case "C":
                self._compute(statement.tensor)
            case "F" if self.device.kind == "hip":
                for name in epilogue_operands(self.chain, statement.tensor):
                    self._add(self._bytes(name), kept=False)
            case "S" if self.device.kind == "cuda":
                self._add(min(self._bytes(statement.tensor), OUTPUT_BYTES * self.threads), kept=False)
            case _:
                pass

    def _load(self, name: str, innermost: Loop | None) -> None:
        readers = [product for product in self.chain.products if name in operands(product)]
        num_bytes = self._bytes(name)
        if innermost is not None and self._is_copied_ahead(name, innermost, readers):
            in_place = any(self.dots.is_warp_group(product.out) for product in readers)
            buffer = self._add(num_bytes * (self.num_stages - 1 + in_place), kept=True)
            buffer.ahead = True
        elif not readers:
            self.computed.add(name)
            return
        elif self.device.kind == "cuda" and all(self._is_transposed(name, product) for product in readers):
            buffer = self._add(min(num_bytes, PASSING_BYTES * self.threads), kept=False)
        else:
            buffer = self._add(num_bytes, kept=self.device.kind == "cuda")
        self.open[name] = buffer

    def _compute(self, value: str) -> None:
        for name in operands(product_of(self.chain, value)):
            if name in self.open:
                buffer = self.open[name]
                buffer.last = self.now if buffer.kept else buffer.last
            elif name in self.computed and not self.dots.stays_in_registers(name, value):
                buffer = self._add(self._bytes(name), kept=self.device.kind == "cuda")
                buffer.first = self.older.get(name, self.now)
                if buffer.kept:
                    self.open[name] = buffer
                else:
                    buffer.last = buffer.first
        self.computed.add(value)

    def _add(self, num_bytes: int, *, kept: bool) -> _Buffer:
        buffer = _Buffer(num_bytes, self.now, self.now, kept)
        self.buffers.append(buffer)
        return buffer

    def _is_copied_ahead(self, name: str, loop: Loop, readers: Sequence[MatMul]) -> bool:
        """Whether a load in an innermost loop is pipelined: it feeds a product there, in words of 4 bytes or more."""
        letters = self.chain.tensors[name]
        aligned = bool(letters) and letters[-1] in self.tiles and self.chain.sizes[letters[-1]] % ALIGNED_ENTRIES == 0
        wide = self._bytes(name) >= COPY_BYTES * self.threads
        feeds = readers or (self.device.kind == "cuda" and self._feeds_product(name, loop))
        return self.num_stages > 1 and aligned and wide and bool(feeds)

    def _feeds_product(self, name: str, loop: Loop) -> bool:
        """Whether an operand of an epilogue changes a value that a product in the same loop reads."""
        inside = list(statements_in(loop.body))
        finished = {x.tensor for x in inside if x.kind == "F" and name in epilogue_operands(self.chain, x.tensor)}
        return any(x.kind == "C" and finished & set(operands(product_of(self.chain, x.tensor))) for x in inside)

    def _is_transposed(self, name: str, product: MatMul) -> bool:
        """Whether a right operand of 16 bits changes its letters' order on the way to a product of single warps."""
        columns = next(letter for letter in reversed(self.chain.tensors[product.out]) if letter in self.tiles)
        stored = "".join(letter for letter in self.chain.tensors[name] if letter in self.tiles)
        is_narrow = self.chain.dtype != "fp32"
        return stored == columns + product.over and is_narrow and not self.dots.is_warp_group(product.out)

    def _is_invariant(self, item: Loop | Statement) -> bool:
        """Whether what begins a loop does the same in every round: all that it reads is older."""
        match item:
            case Statement("C", value) if not self.dots.is_warp_group(value):
                names = operands(product_of(self.chain, value))
            case Statement("F", value):
                names = (value, *epilogue_operands(self.chain, value))
            case _:
                return False
        return all(name in self.open or name in self.computed for name in names)

    def _has_loop(self, items: Sequence[Loop | Statement]) -> bool:
        return any(
            isinstance(item, Loop) and (not is_written_out(item, self.chain, self.live) or self._has_loop(item.body))
            for item in items
        )

    def _bodies(
        self, items: Sequence[Loop | Statement], path: tuple[int, ...]
    ) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every value with the body that its product stands in."""
        for index, item in enumerate(items):
            if isinstance(item, Loop):
                yield from self._bodies(
                    item.body, path if is_written_out(item, self.chain, self.live) else (*path, index)
                )
            elif item.kind == "C":
                yield item.tensor, path

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(block(self.tiles[letter]) for letter in self.chain.tensors[name] if letter in self.tiles)

    def _bytes(self, name: str) -> int:
        return prod(self._shape(name)) * (1 if name in self.chain.boolean_inputs else self.chain.item_bytes)
