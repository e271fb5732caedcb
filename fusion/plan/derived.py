"""One gradient of a chain as a chain: what stood between two products is computed again, never stored.

Where E = C' D, and C' is C = A B after its stages f, the gradient that reaches A through C takes a chain of three:

    C = A B, up to the state that f' reads;    dC = dE D^T, times f'(C);    dA = dC B^T

C is one buffer, so it is computed once for every state that is read. A softmax comes back as exp(C - lse), whose
log-sum-exp the forward kernel saves, and dC = C' * (dC' - delta), where delta = rowsum(dC' * C') = rowsum(dE * E): of
an E in fp32, as its rounding to fp16 or bf16 is nothing that the unfused computation would feel here.

Where a letter is summed over and indexes the result too, an input is read a second time under another letter. Along
batch letters that an input lacks, its gradient is written once for each of them and summed afterwards.

Source: MCFuser (arXiv:2506.22169) has no backward; the softmax follows FlashAttention (arXiv:2205.14135), appendix B.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import count
from string import ascii_uppercase
from typing import Literal, cast, get_args

from fusion.plan.chain import Chain
from fusion.plan.stages import Activation, Dim, Elementwise, Input, MatMul, Operation, Softmax, Stage, operands
from fusion.plan.statements import product_of
from fusion.plan.verify import MAX_PRODUCTS

Statistic = Literal["lse", "neg_lse", "lse_rest", "neg_delta", "neg_delta_rest"]
_SUBTRACT: dict[tuple[str, bool], tuple[tuple[Operation, Statistic], ...]] = {  # (statistic, in fp32) -> stages
    ("lse", True): (("exp_minus", "lse"),),
    ("lse", False): (("add", "neg_lse"), ("exp_minus", "lse_rest")),
    ("delta", True): (("add", "neg_delta"),),
    ("delta", False): (("add", "neg_delta"), ("add", "neg_delta_rest")),
}


class GradientError(ValueError):
    """A chain whose gradient is no chain; the message says which part is at fault and what to do; not in the paper."""


@dataclass(frozen=True)
class Source:
    """What an input of a derived chain is.

    Source: our definition. In fp16 and bf16 a row statistic comes as two numbers, rounded and rest, to be exact enough.
    """

    kind: Literal["input", "value", "gradient", "ones"] | Statistic
    """An input or a complete value of the forward chain, the gradient of a value before its stages, a statistic."""
    name: str
    """Of the tensor of the forward chain: for lse the value under the softmax, for delta the one whose rows it sums."""

    def __str__(self) -> str:
        return self.name if self.kind in ("input", "value") else f"{self.kind}({self.name})"


@dataclass(frozen=True)
class Step:
    """A chain whose output is the gradient of a tensor, or its part through one of the stages that read the tensor.

    Source: our definition.
    """

    target: str
    """An input of the forward chain, or a value that is stored during the backward pass."""
    chain: Chain
    sources: tuple[tuple[str, Source], ...]
    """What each input of the chain is."""
    summed: str
    """Letters of the output to be summed over; the others are the target's, in its storage order."""

    def __str__(self) -> str:
        renamed = [f"{name} = {source}" for name, source in self.sources if name != str(source)]
        given = f" where {', '.join(renamed)}" if renamed else ""
        return f"d{self.target} += {f'sum over {self.summed} of ' * bool(self.summed)}{self.chain}{given}"


def derive(forward: Chain, stored: frozenset[str], index: int, target: str) -> Step:
    """The gradient that reaches a tensor through one of the stages that read it.

    Args:
        forward: The chain whose gradient is taken.
        stored: Its values that are at hand as tensors, the output among them; the gradients of these before their own
            stages are at hand too.
        index: Of the stage in `forward.stages`: a product, or a stage of a value that is not stored.
        target: One of its operands, an input or a stored value.

    Returns:
        The chain with what it reads.

    Raises:
        GradientError: It would take too many products, or a stage has no gradient as a chain.

    Source: not in the paper.
    """
    work = _Derivation(forward, stored)
    stage, letters = forward.stages[index], forward.tensors[target]
    if isinstance(stage, MatMul):
        work.operand_gradient(stage, target, f"d{target}")
        return work.step(target)
    name = work.operand_part(index)
    row = next((x for x in forward.tensors[stage.x] if x in forward.loops and x not in letters), "")
    if row:
        column = work.add_letter(row, 1)
        ones = work.bind("ones", row + column, Source("ones", row))
        work.backward.append(MatMul(work.fresh_name(f"d{target}"), name, ones, over=row))
    return work.step(target)


class _Derivation:
    """A chain in the making: first what is computed again, then the way back."""

    def __init__(self, forward: Chain, stored: frozenset[str]) -> None:
        self.forward, self.stored, self.letters = forward, stored, forward.tensors
        self.inputs = {tensor.name for tensor in forward.inputs}
        self.dims = {dim.name: dim for dim in forward.dims}
        self.renamed: dict[str, str] = {}
        self.bound: dict[tuple[Source, str], str] = {}
        self.states: dict[tuple[str, int], str] = {}
        self.names: set[str] = set()
        self.again: list[Stage] = []
        self.backward: list[Stage] = []

    def step(self, target: str) -> Step:
        """Close the chain, with its dimensions ordered so that the output is stored as the target is."""
        num_products = sum(isinstance(stage, MatMul) for stage in self.again + self.backward)
        if num_products > MAX_PRODUCTS:
            raise GradientError(
                f"the gradient of {target!r} takes a chain of {num_products} products, accepted are {MAX_PRODUCTS}: "
                f"end the chain earlier, or take a gate or an activation out of {self.forward}"
            )
        own = "".join(self.renamed.get(letter, letter) for letter in self.letters[target])
        used = set("".join(letters for _, letters in self.bound))
        others = [dim for dim in self.dims.values() if dim.name in used and dim.name not in own]
        repeats = tuple(dim for dim in others if dim.batch)
        loops = tuple(dim for dim in others if not dim.batch)
        inputs = tuple(Input(name, letters) for (_, letters), name in self.bound.items())
        dims = repeats + tuple(self.dims[letter] for letter in own) + loops
        chain = Chain(dims, inputs, (*self.again, *self.backward), self.forward.dtype)
        summed = "".join(letter for letter in chain.tensors[chain.output] if letter not in own)
        return Step(target, chain, tuple((name, source) for (source, _), name in self.bound.items()), summed)

    def fresh_name(self, base: str) -> str:
        name = next(name for n in count(1) if (name := base if n == 1 else f"{base}_{n}") not in self.names)
        self.names.add(name)
        return name

    def add_letter(self, like: str, size: int) -> str:
        """The next letter that is free."""
        start = ascii_uppercase.index(like)
        order = ascii_uppercase[start:] + ascii_uppercase[:start]
        letter = next((letter for letter in order if letter not in self.dims), "")
        if not letter:
            raise GradientError(
                f"a gradient needs one letter more than the 26 that {self.forward} has: join two of them"
            )
        self.dims[letter] = Dim(letter, size)
        return letter

    def bind(self, base: str, letters: str, source: Source) -> str:
        """The name of an input, which is new unless the same tensor has been read under the same letters."""
        key = (source, letters)
        if key not in self.bound:
            self.bound[key] = self.fresh_name(base)
        return self.bound[key]

    def at_hand(self, name: str, letters: str) -> str:
        return self.bind(name, letters, Source("input" if name in self.inputs else "value", name))

    def tensor(self, name: str) -> str:
        """An operand of the forward chain: at hand, or computed again with all its stages."""
        if name in self.inputs or name in self.stored:
            return self.at_hand(name, self.letters[name])
        return self.state(name, len(self.forward.epilogue(name)))

    def state(self, value: str, num_stages: int) -> str:
        """A value computed again, as it is after so many of its stages."""
        key = (value, num_stages)
        if key not in self.states:
            product = product_of(self.forward, value)
            left, right = self.tensor(product.left), self.tensor(product.right)
            name = self.states[key] = self.fresh_name(value)
            stages: list[Stage] = [replace(product, out=name, left=left, right=right)]
            for stage in self.forward.epilogue(value)[:num_stages]:
                match stage:
                    case Elementwise(operand=str(operand)):
                        stages.append(replace(stage, x=name, operand=self.tensor(operand)))
                    case Softmax(over=over):
                        stages += self.subtract(name, "lse", value, self.letters[value].replace(over, ""))
                    case _:
                        stages.append(replace(stage, x=name))
            self.again += stages
        return self.states[key]

    def subtract(self, x: str, statistic: Literal["lse", "delta"], name: str, rows: str) -> list[Stage]:
        """Take a row statistic off a buffer: in one stage, or in two where one number is not exact enough."""
        stages = _SUBTRACT[statistic, self.forward.dtype == "fp32"]
        return [Elementwise(x, operation, self.bind(kind, rows, Source(kind, name))) for operation, kind in stages]

    def operand_gradient(self, product: MatMul, operand: str, base: str) -> str:
        """The product that carries the gradient of a product's value on to one of its operands."""
        value = product.out
        if value in self.stored:
            upstream = self.bind(f"d{value}", self.letters[value], Source("gradient", value))
        else:
            upstream = self.gradient(value, 0)
        is_left = operand == product.left
        other = product.right if is_left else product.left
        (over,) = (x for x in self.letters[other] if x in self.forward.loops and x != product.over)
        if other in self.inputs:
            letters = self.letters[other]
            if any(isinstance(stage, MatMul) and stage.over == product.over for stage in self.again + self.backward):
                renamed = self.add_letter(product.over, self.dims[product.over].size)
                self.renamed[product.over] = renamed
                letters = letters.replace(product.over, renamed)
            known = self.at_hand(other, letters)
        else:
            known = self.tensor(other)
        name = self.fresh_name(base)
        left, right = (upstream, known) if is_left else (known, upstream)
        self.backward.append(MatMul(name, left, right, over=over))
        return name

    def operand_part(self, index: int) -> str:
        """The buffer that holds the gradient of a stage's operand, before it is summed to the operand's letters."""
        stage = self.forward.stages[index]
        assert isinstance(stage, Elementwise)
        position = sum(earlier in self.forward.epilogue(stage.x) for earlier in self.forward.stages[:index])
        name = self.gradient(stage.x, position + 1)
        if stage.operation == "mul":
            self.backward.append(Elementwise(name, "mul", self.state(stage.x, position)))
        return name

    def reader(self, value: str) -> int:
        """Index of the one stage that reads a value."""
        (index,) = (index for index, stage in enumerate(self.forward.stages) if value in operands(stage))
        return index

    def gradient(self, value: str, num_stages: int) -> str:
        """The buffer that holds the gradient of a value that is not stored, as it is after so many of its stages."""
        index = self.reader(value)
        reader = self.forward.stages[index]
        if isinstance(reader, MatMul):
            name = self.operand_gradient(reader, value, f"d{value}")
        else:
            name = self.operand_part(index)
        for position in reversed(range(num_stages, len(self.forward.epilogue(value)))):
            self.backward += self.through(value, position, name)
        return name

    def through(self, value: str, position: int, name: str) -> list[Stage]:
        """From the gradient after a stage to that before it."""
        match self.forward.epilogue(value)[position]:
            case Elementwise(operation="mul", operand=operand):
                return [Elementwise(name, "mul", self.tensor(operand) if isinstance(operand, str) else operand)]
            case Elementwise(operation=operation) if operation in get_args(Activation):
                return [Elementwise(name, cast(Operation, f"{operation}_grad"), self.state(value, position))]
            case Softmax(over=over):
                out = self.softmax_reader(value, position, over)
                rows = "".join(x for x in self.letters[out] if x in self.letters[value] or x in self.forward.batch)
                return [
                    *self.subtract(name, "delta", out, rows),
                    Elementwise(name, "mul", self.state(value, position + 1)),
                ]
            case _:
                return []  # a sum passes it on; what is masked has no share in the softmax that follows

    def softmax_reader(self, value: str, position: int, over: str) -> str:
        """The value whose product with its gradient sums to delta, which takes softmax and reader to go together."""
        reader = self.forward.stages[self.reader(value)]
        if not isinstance(reader, MatMul) or reader.over != over:
            raise GradientError(f"the softmax of {value!r} over {over} must feed a product that sums over {over}")
        for stage in self.forward.epilogue(value)[position + 1 :]:
            if not isinstance(stage, Elementwise) or stage.operation != "mul":
                raise GradientError(f"after the softmax of {value!r} only 'mul' has a gradient as a chain, not {stage}")
        return reader.out
