"""A program run as it is written: tile by tile on torch tensors, with every byte and every flop counted.

What a program claims is checked on the way: a load finds its tile only where its loops say so, a value is read when its
sum is complete and never after another tile took its place, and a finish runs once for each sum.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product as combinations

import torch
from torch import Tensor

from fusion import reference
from fusion.plan import Causal, Chain, Elementwise, Softmax
from fusion.plan.placement import Loop, Program, live_tiles
from fusion.plan.prune import online_reader
from fusion.plan.statements import Statement, product_of


@dataclass
class Counts:
    """What the statements of a program did, all blocks together."""

    trips: Counter = field(default_factory=Counter)
    bytes: Counter = field(default_factory=Counter)
    flops: Counter = field(default_factory=Counter)
    padded_flops: Counter = field(default_factory=Counter)


def interpret(
    chain: Chain, program: Program, tiles: Mapping[str, int], tensors: Mapping[str, Tensor]
) -> tuple[Tensor, Counts]:
    """The output of a program and what it did.

    Sums are kept in fp32, of float64 inputs in float64; a value is rounded to the chain's dtype where a product reads
    it.
    """
    first = next(tensor for tensor in tensors.values() if tensor.dtype != torch.bool)
    output = torch.full(chain.shape(chain.output), torch.nan, dtype=first.dtype)
    counts = Counts()
    grid = [(letter, range(extent)) for letter, extent in program.grid]
    grid += [(letter, range(chain.sizes[letter])) for letter in chain.batch]
    for indices in combinations(*[rounds for _, rounds in grid]):
        at = dict(zip([letter for letter, _ in grid], indices, strict=True))
        _Block(chain, program, tiles, tensors, output, counts, at).run(program.body)
    return output, counts


@dataclass
class _Sum:
    """One accumulator: the tile that it belongs to, and how far it is."""

    coordinates: dict[str, int]
    total: Tensor
    steps: int = 0
    finished: bool = False
    maximum: Tensor | None = None
    denominator: Tensor | None = None


class _Block:
    def __init__(self, chain, program, tiles, tensors, output, counts, at):
        self.chain, self.program, self.tiles, self.tensors = chain, program, tiles, tensors
        self.output, self.counts, self.at = output, counts, dict(at)
        self.letters, self.sizes = chain.tensors, chain.sizes
        self.live = live_tiles(program, chain)
        self.rounded = output.dtype
        self.wide = torch.float64 if output.dtype == torch.float64 else torch.float32
        self.loaded: dict[str, tuple[dict[str, int], Tensor]] = {}
        self.sums: dict[tuple, _Sum] = {}
        self.paths = dict(program.walk())

    def run(self, body) -> None:
        for item in body:
            if isinstance(item, Loop):
                self.start_sums(item)
                for index in range(item.extent):
                    self.at[item.letter] = index
                    self.run(item.body)
                del self.at[item.letter]
            else:
                self.counts.trips[item] += 1
                {"L": self.load, "C": self.compute, "F": self.finish, "S": self.store}[item.kind](item)

    def start_sums(self, loop: Loop) -> None:
        """Drop this tile's sums over a loop that is entered anew."""
        for value in (product.out for product in self.chain.products):
            inside = any(around is loop for around in self.paths[Statement("C", value)])
            if inside and product_of(self.chain, value).over == loop.letter:
                self.sums = {key: kept for key, kept in self.sums.items() if key[0] != value or not self.is_here(kept)}

    def load(self, statement: Statement) -> None:
        name = statement.tensor
        tile = self.tensors[name][self.slices(self.letters[name])]
        self.loaded[name] = (self.where(self.letters[name]), tile)
        self.counts.bytes[statement] += tile.numel() * tile.element_size()

    def compute(self, statement: Statement) -> None:
        product, letters = product_of(self.chain, statement.tensor), self.letters
        out, left, right, over = product.out, product.left, product.right, product.over
        sum_ = self.open_sum(out, over)
        operands = {name: self.read(name).to(self.rounded) for name in {left, right}}
        online = self.online(out)
        if online is not None:
            operands[online.x] = self.weights(online, sum_, out).to(self.rounded)
        sum_.total = sum_.total + torch.einsum(
            f"{letters[left]},{letters[right]}->{letters[out]}", *(operands[x].to(self.wide) for x in (left, right))
        )
        sum_.steps += 1
        own = letters[out] + over
        flops, padded = 2, 2
        for letter in own:
            extent = self.slices(letter)[0]
            flops *= extent.stop - extent.start
            padded *= self.tiles.get(letter, 1)
        self.counts.flops[statement] += flops
        self.counts.padded_flops[statement] += padded

    def finish(self, statement: Statement) -> None:
        value = statement.tensor
        sum_ = self.complete(value)
        assert not sum_.finished, f"{statement} runs twice"
        sum_.finished = True
        self.divide(value, sum_)
        for stage in self.chain.epilogue(value):
            if isinstance(stage, Softmax) and self.is_split(stage):
                break  # its reader does this and what follows
            sum_.total = self.stage(stage, sum_.total)

    def store(self, statement: Statement) -> None:
        name = statement.tensor
        sum_, loops = self.sums[self.key(name)], self.paths[statement]
        complete = sum_.steps == self.num_steps(name)
        if all(
            loop.letter != product_of(self.chain, name).over for loop in loops
        ):  # else a naive store of partial sums
            assert complete, f"{statement} before its sum is complete"
            assert sum_.finished or not self.chain.epilogue(name), f"{statement} before its finish"
        if complete:
            self.divide(name, sum_)
        tile = sum_.total.to(self.output.dtype)
        self.output[self.slices(self.letters[name])] = tile
        self.counts.bytes[statement] += tile.numel() * tile.element_size()

    def read(self, name: str) -> Tensor:
        """A tile of an input, which must be the loaded one, or of a value, which must be complete and finished."""
        if name in self.tensors:
            where, tile = self.loaded[name]
            assert where == self.where(self.letters[name]), f"{name}: {where} is loaded, not {self.at}"
            return tile
        sum_ = self.complete(name)
        assert sum_.finished or not self.chain.epilogue(name), f"{name} is read before its finish"
        if not sum_.finished:
            self.divide(name, sum_)
        return sum_.total

    def open_sum(self, value: str, over: str) -> _Sum:
        key, coordinates = self.key(value), self.where(self.letters[value])
        known = self.sums.get(key)
        around = any(loop.letter == over for loop in self.paths[Statement("C", value)])
        if known is None or known.coordinates != coordinates or not around:
            shape = [part.stop - part.start for part in self.slices(self.letters[value])]
            known = self.sums[key] = _Sum(coordinates, torch.zeros(shape, dtype=self.wide))
        assert known.steps == self.at.get(over, 0), (
            f"{value} has {known.steps} steps before round {self.at.get(over, 0)}"
        )
        return known

    def complete(self, value: str) -> _Sum:
        sum_, steps = self.sums[self.key(value)], self.num_steps(value)
        assert sum_.coordinates == self.where(self.letters[value]), f"{value}: another tile took the place of this one"
        assert sum_.steps == steps, f"{value} is read after {sum_.steps} of {steps} steps"
        return sum_

    def num_steps(self, value: str) -> int:
        loops, over = self.paths[Statement("C", value)], product_of(self.chain, value).over
        return next((loop.extent for loop in loops if loop.letter == over), 1)

    def online(self, value: str) -> Softmax | None:
        """The split softmax that a product finishes."""
        return next(
            (
                stage
                for stage in self.chain.stages
                if isinstance(stage, Softmax) and online_reader(self.chain, stage) == value and self.is_split(stage)
            ),
            None,
        )

    def is_split(self, softmax: Softmax) -> bool:
        return any(loop.letter == softmax.over for loop in self.paths[Statement("F", softmax.x)])

    def weights(self, softmax: Softmax, sum_: _Sum, out: str) -> Tensor:
        """exp(scores - running maximum), with the sums of the reader rescaled to that maximum."""
        scores, letters = self.complete(softmax.x).total, self.letters[softmax.x]
        dim, rest = letters.index(softmax.over), letters.replace(softmax.over, "")
        maximum = scores.amax(dim)
        if sum_.maximum is not None:
            maximum = torch.maximum(maximum, sum_.maximum)
        finite = maximum.masked_fill(maximum == -torch.inf, 0.0)
        weights = torch.exp(scores - finite.unsqueeze(dim))
        total = weights.sum(dim)
        if sum_.maximum is not None:
            scale = torch.exp(sum_.maximum - finite)
            sum_.total = sum_.total * reference._along(scale, rest, self.letters[out])
            total = total + scale * sum_.denominator
        sum_.maximum, sum_.denominator = maximum, total
        stages = self.chain.epilogue(softmax.x)
        for stage in stages[stages.index(softmax) + 1 :]:
            weights = self.stage(stage, weights)
        return weights

    def divide(self, value: str, sum_: _Sum) -> None:
        """End an online softmax whose sums are complete."""
        softmax = self.online(value)
        if softmax is not None and sum_.denominator is not None:
            rest = self.letters[softmax.x].replace(softmax.over, "")
            below = sum_.denominator.masked_fill(sum_.denominator == 0, 1.0)
            sum_.total = sum_.total / reference._along(below, rest, self.letters[value])
            sum_.denominator = None

    def stage(self, stage, x: Tensor) -> Tensor:
        letters = self.letters[stage.x]
        match stage:
            case Elementwise(_, operation, None):
                return reference._activation(x, operation)
            case Elementwise(_, "mask", str(operand)):
                return x.masked_fill(~reference._along(self.read(operand), self.letters[operand], letters), -torch.inf)
            case Elementwise(_, operation, str(operand)):
                return reference._combine(
                    x, operation, reference._along(self.read(operand).to(self.wide), self.letters[operand], letters)
                )
            case Elementwise(_, operation, number):
                return reference._combine(x, operation, torch.full_like(x, number))
            case Causal(_, row, column, diagonal):
                row_at, column_at = (
                    reference._along(torch.arange(part.start, part.stop), letter, letters)
                    for letter in (row, column)
                    for part in self.slices(letter)
                )
                return x.masked_fill(column_at > row_at + diagonal, -torch.inf)
            case Softmax(_, over):
                return reference._softmax(x, letters.index(over))

    def key(self, value: str) -> tuple:
        """A value has one accumulator for each of the tiles that are live at once."""
        return value, tuple(self.at.get(letter, 0) for letter in self.live[value])

    def is_here(self, sum_: _Sum) -> bool:
        return all(self.at.get(letter, index) == index for letter, index in sum_.coordinates.items())

    def where(self, letters: str) -> dict[str, int]:
        return {letter: self.at.get(letter, 0) for letter in letters}

    def slices(self, letters: str) -> tuple[slice, ...]:
        found = []
        for letter in letters:
            size = self.tiles.get(letter, 1)
            start = self.at.get(letter, 0) * size
            found.append(slice(start, min(start + size, self.sizes[letter])))
        return tuple(found)
