"""The paper's performance model: the time of a schedule from the bytes that it moves and the flops that it does.

    t = (t_mem + t_comp) * alpha,  t_mem = bytes / W,  t_comp = flops / P,  alpha = (N_block + N_SM) / N_block

Bytes are exact: what lies beyond an edge is masked and not moved. Flops are those of whole tiles, which are computed
whatever is masked; a GPU kernel's tiles are filled up to powers of two, so those count there.

Source: MCFuser (arXiv:2506.22169), analytical performance model; edges and powers of two are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fusion.plan.chain import Chain
from fusion.plan.device import Device
from fusion.plan.expression import Expression
from fusion.plan.schedule import Schedule, block
from fusion.plan.traffic import compute_letters, repeats, skeleton


@dataclass(frozen=True)
class Prediction:
    """The time of a schedule and what it is made of."""

    memory_us: float
    """All loads and stores at the device's bandwidth: t_mem."""
    compute_us: float
    """All products at the device's peak: t_comp."""
    blocks: int
    """N_block: blocks of the grid, the batch's included."""
    slowdown: float
    """alpha: what it costs that blocks are few."""

    @property
    def total_us(self) -> float:
        """The paper's t_estm."""
        return (self.memory_us + self.compute_us) * self.slowdown


@dataclass(frozen=True)
class _Terms:
    """What the times of an expression are made of while the same loops turn."""

    moved: tuple[tuple[int, str], ...]
    """Bytes, the batch's rounds included, and the loops that repeat them."""
    computed: tuple[tuple[int, str, str], ...]
    """Rounds of the batch, letters of a tile's multiplications, and the loops around it."""
    grid: str


class PerformanceModel:
    """The model of a chain on a device; what expressions and turning loops decide is worked out once for each."""

    def __init__(self, chain: Chain, device: Device) -> None:
        """Of a chain on a device."""
        self.chain, self.device = chain, device
        self._sizes = {letter: max(chain.sizes[letter], 1) for letter in chain.loops}
        self._batch = math.prod(chain.sizes[letter] for letter in chain.batch)
        self._terms: dict[tuple[Expression, str], _Terms] = {}

    def predict(self, schedule: Schedule) -> Prediction:
        """The time of a schedule.

        Args:
            schedule: Of the chain; warps and stages are not in the model.

        Returns:
            The prediction, zero of everything where a batch is empty.
        """
        tiles, sizes, device = dict(schedule.tiles), self._sizes, self.device
        rounds = {letter: -(-size // tiles[letter]) for letter, size in sizes.items()}
        turning = "".join([letter for letter, number in rounds.items() if number > 1])
        key = schedule.expression, turning
        if key not in self._terms:
            self._terms[key] = self._make(*key)
        terms = self._terms[key]
        moved_bytes = 0
        for number, letters in terms.moved:
            for letter in letters:
                number *= rounds[letter]
            moved_bytes += number
        if device.kind != "cpu":
            tiles = {letter: block(tile) for letter, tile in tiles.items()}
        flops = 0
        for number, own, around in terms.computed:
            for letter in own:
                number *= tiles[letter]
            for letter in around:
                number *= rounds[letter]
            flops += 2 * number
        blocks = self._batch
        for letter in terms.grid:
            blocks *= rounds[letter]
        slowdown = (blocks + device.num_sms) / blocks if blocks else 1.0
        peak = device.flops_per_s(self.chain.dtype)
        return Prediction(1e6 * moved_bytes / device.dram_bytes_per_s, 1e6 * flops / peak, blocks, slowdown)

    def _make(self, expression: Expression, turning: str) -> _Terms:
        chain = self.chain
        program = skeleton(chain, expression, turning)
        moved: dict[str, int] = {}
        computed = []
        for found in repeats(chain, program):
            if found.statement.kind in "LS":
                again = "".join(letter for letter in found.again if letter in turning)
                batch = math.prod(chain.sizes[letter] for letter in found.again if letter in chain.batch)
                moved[again] = moved.get(again, 0) + chain.num_bytes(found.statement.tensor) * batch
            elif found.statement.kind == "C":
                own = "".join(x for x in compute_letters(chain, found.statement.tensor) if x in chain.loops)
                around = "".join(letter for letter in found.around if letter in turning)
                computed.append((self._batch, own, around))
        grid = "".join(letter for letter, extent in program.grid if extent > 1)
        return _Terms(tuple((number, again) for again, number in moved.items()), tuple(computed), grid)
