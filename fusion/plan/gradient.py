"""The gradients of a chain as chains: what a backward pass computes, and nothing else.

The value of a product is either stored during the backward pass, or computed again inside every chain that needs it:

    the output          its gradient comes from the caller
    a value of values   the middle one of three products in a row, and what the stages of a stored value read: a shorter
                        chain writes it, it gets a gradient as the output does; both exist during the backward pass only
    the others          the intermediate of two products in a row is never stored; derived.py takes gradients past it

The stages of a stored value are its tail, which is differentiated as on any tensor: the value is there. Stored values
cut a chain into segments of one or two products in a row, which run forwards if they have to and then backwards.

Source: our definition (MCFuser, arXiv:2506.22169, has no backward).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import get_args

from fusion.plan.chain import Chain
from fusion.plan.derived import GradientError, Step, derive
from fusion.plan.stages import ActivationGrad, Causal, Elementwise, Input, MatMul, Softmax, Stage, operands
from fusion.plan.statements import epilogue_operands, product_of


@dataclass(frozen=True)
class Segment:
    """A stored value, and the gradients of the tensors that it is made of."""

    value: str
    forward: Chain
    """Its product, from inputs and from stored values of earlier segments under their own names."""
    tail: tuple[Elementwise | Causal | Softmax, ...]
    """The stages of the value itself."""
    tail_needs: tuple[str, ...]
    """Operands of the tail whose gradients are asked for."""
    steps: tuple[Step, ...]
    needs_forward: bool = False
    """Whether the backward pass needs the product's value or, if `needs_lse`, what a softmax before it divides by."""

    @property
    def needs_lse(self) -> bool:
        """Whether a step reads the log-sum-exp of the one softmax in `forward`."""
        return self._reads("lse")

    @property
    def delta_over(self) -> str:
        """The letter over which the product's value times its gradient is summed for a step, or none."""
        softmaxes = [stage.x for stage in self.forward.stages if isinstance(stage, Softmax)]
        tensors = self.forward.tensors
        summed = (x for x in tensors[self.value] if x in self.forward.loops and x not in tensors[softmaxes[0]])
        return next(summed) if self._reads("neg_delta") else ""

    def _reads(self, kind: str) -> bool:
        return any(kind in source.kind for step in self.steps for _, source in step.sources)


@dataclass(frozen=True)
class Gradients:
    """What a backward pass does: its segments in the order in which they run forwards."""

    chain: Chain
    needs: frozenset[str]
    """Inputs whose gradients are asked for."""
    segments: tuple[Segment, ...]

    @property
    def saves_forward(self) -> bool:
        """Whether the forward pass has to keep its output and log-sum-exp, as the backward pass reads just these."""
        return self.segments[-1].needs_forward and self.segments[-1].forward == self.chain

    @property
    def chains(self) -> tuple[Chain, ...]:
        """The chains that the backward pass runs, each once: they are to be planned as any other."""
        again = (segment.forward for segment in self.segments if segment.needs_forward)
        steps = (step.chain for segment in self.segments for step in segment.steps)
        return tuple(dict.fromkeys(chain for chain in (*again, *steps) if chain != self.chain))

    def __str__(self) -> str:
        lines = []
        for segment in self.segments:
            if segment.needs_forward:
                source = "kept" if segment.forward == self.chain else "again"
                lines.append(f"{source}{' with log-sum-exp' * segment.needs_lse}: {segment.forward}")
        for segment in reversed(self.segments):
            if segment.tail:
                lines.append(
                    f"in torch: the stages of {segment.value}, for {', '.join((segment.value, *segment.tail_needs))}"
                )
            lines += [str(step) for step in segment.steps]
        return "\n".join(lines)


def gradients(chain: Chain, needs: Collection[str]) -> Gradients:
    """Plan the backward pass of a chain.

    Args:
        chain: What ran forwards.
        needs: Names of the inputs whose gradients are asked for.

    Returns:
        Segments with the chains to run.

    Raises:
        ValueError: `needs` is empty or names what is no input, or a boolean one.
        GradientError: A value is read twice, a gate is made of a value, what stands before or after a softmax has no
            gradient as a chain, or a gradient would take too many products.
    """
    accepted = sorted({tensor.name for tensor in chain.inputs} - chain.boolean_inputs)
    if not needs or not set(needs) <= set(accepted):
        raise ValueError(f"needs={sorted(needs)} must be names of inputs that have a gradient: some of {accepted}")
    _check(chain)
    values = _stored(chain, chain.output)
    stored = frozenset(values)
    wanted = set(needs)
    for value in values:
        made_of = {name for index in _region(chain, stored, value) for name in operands(chain.stages[index])}
        if wanted & (made_of | set(epilogue_operands(chain, value))):
            wanted.add(value)
    segments: list[Segment] = []
    read: set[str] = set()
    for value in reversed(values):
        segment = _segment(chain, stored, wanted, value, is_read=value in read)
        read |= {source.name for step in segment.steps for _, source in step.sources if source.kind == "value"}
        if segment.needs_forward:
            read |= {tensor.name for tensor in segment.forward.inputs} | set(epilogue_operands(chain, value))
        if segment.needs_forward or value in wanted:
            segments.append(segment)
    return Gradients(chain, frozenset(needs), tuple(reversed(segments)))


def _check(chain: Chain) -> None:
    for stage in chain.stages:
        if isinstance(stage, Elementwise) and stage.operation in ("exp_minus", *get_args(ActivationGrad)):
            raise GradientError(f"{stage} is a gradient's stage, and no gradient is differentiated again")
    for value in chain.intermediates:
        readers = [stage for stage in chain.stages if value in operands(stage)]
        if len(readers) > 1:
            raise GradientError(f"{value!r} is read {len(readers)} times: end a chain with it, start others from it")


def _stored(chain: Chain, value: str) -> tuple[str, ...]:
    """The values that are stored if one is: it and those it depends on, which come before it."""
    of_product = [name for name in operands(product_of(chain, value)) if name in chain.intermediates]
    deeper = [name for name in of_product if _is_made_of_values(chain, name)]
    for name in sorted(_unstored(chain, frozenset(deeper), of_product)):
        for gate in epilogue_operands(chain, name):
            if gate in chain.intermediates and _is_made_of_values(chain, gate):
                raise GradientError(f"{gate!r} changes {name!r} and is made of a value: give it a chain of its own")
    deeper += [name for name in epilogue_operands(chain, value) if name in chain.intermediates]
    return (*(earlier for name in deeper for earlier in _stored(chain, name)), value)


def _is_made_of_values(chain: Chain, value: str) -> bool:
    return not set(operands(product_of(chain, value))).isdisjoint(chain.intermediates)


def _unstored(chain: Chain, stored: frozenset[str], names: Iterable[str]) -> set[str]:
    """The values among `names` that are computed again, with those that their stages read."""
    own = {name for name in names if name in chain.intermediates and name not in stored}
    gates = [name for value in own for name in epilogue_operands(chain, value)]
    return own | _unstored(chain, stored, gates) if own else own


def _region(chain: Chain, stored: frozenset[str], value: str) -> tuple[int, ...]:
    """Indexes of the stages that make a stored value, without its own, from inputs and other stored values."""
    unstored = _unstored(chain, stored, operands(product_of(chain, value)))
    return tuple(
        index
        for index, stage in enumerate(chain.stages)
        if (stage.out in unstored | {value} if isinstance(stage, MatMul) else stage.x in unstored)
    )


def _segment(chain: Chain, stored: frozenset[str], wanted: set[str], value: str, *, is_read: bool) -> Segment:
    region = _region(chain, stored, value)
    tail = chain.epilogue(value)
    steps = tuple(
        derive(chain, stored, index, name)
        for index in region
        for name in dict.fromkeys(operands(chain.stages[index]))
        if name in wanted
    )
    tail_needs = tuple(name for name in epilogue_operands(chain, value) if name in wanted)
    segment = Segment(value, _forward(chain, stored, region), tail, tail_needs, steps)
    if segment.needs_lse and sum(isinstance(stage, Softmax) for stage in segment.forward.stages) > 1:
        raise GradientError(f"two softmaxes before {value!r}, one log-sum-exp: give one of them a chain of its own")
    needs_forward = is_read or segment.needs_lse or (value in wanted and not all(map(is_passed_on, tail)))
    return replace(segment, needs_forward=needs_forward)


def is_passed_on(stage: Stage) -> bool:
    """Whether the gradient goes past a stage without the value that it changes.

    Args:
        stage: Any but a product.
    """
    return isinstance(stage, Elementwise) and (stage.operation == "add" or isinstance(stage.operand, float))


def _forward(chain: Chain, stored: frozenset[str], region: tuple[int, ...]) -> Chain:
    """The chain of some stages, in which stored values that they read are inputs."""
    stages = tuple(chain.stages[index] for index in region)
    read = {name for stage in stages for name in operands(stage)}
    values = tuple(Input(name, chain.tensors[name]) for name in chain.intermediates if name in stored & read)
    inputs = tuple(tensor for tensor in chain.inputs if tensor.name in read) + values
    letters = {letter for tensor in inputs for letter in tensor.dims}
    return Chain(tuple(dim for dim in chain.dims if dim.name in letters), inputs, stages, chain.dtype)
