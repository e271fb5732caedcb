"""A fused chain that autograd differentiates: it keeps its inputs, and its gradients are chains again.

Nothing of an intermediate's size is stored. What runs a chain is handed in, so that the reference, a Triton kernel and
a C++ one get their gradients from the same plan (fusion.plan.gradient).

Source: our definition (MCFuser, arXiv:2506.22169, has no backward).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, overload

import torch
from torch import Tensor

from fusion.plan.chain import Chain
from fusion.plan.derived import GradientError, Source, Statistic
from fusion.plan.gradient import Gradients, Segment, gradients
from fusion.plan.statements import epilogue_operands
from fusion.run.check import check_tensors
from fusion.run.tail import finish, gradients_of_finish


class Execute(Protocol):
    """Runs a chain, without autograd.

    It returns the output, [chain.shape(chain.output)]: in the dtype of the tensors or, with `exact`, as it is before it
    is rounded to fp16 or bf16, in fp32, or in float64 where the tensors are.

    With `save_lse`, asked only of a chain with one softmax, it returns the softmax's log-sum-exp too: a natural
    logarithm, indexed by the letters of the softmax's value, in their order, without the letter that it runs over; in
    fp32, or in float64 where the tensors are; -inf where all entries are.
    """

    @overload
    def __call__(
        self, chain: Chain, tensors: Mapping[str, Tensor], *, exact: bool = False, save_lse: Literal[False] = False
    ) -> Tensor: ...

    @overload
    def __call__(
        self, chain: Chain, tensors: Mapping[str, Tensor], *, exact: bool = False, save_lse: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Execution:
    """How a chain runs."""

    execute: Execute
    """Runs the chain, and those of its gradients; `apply` makes it differentiable."""
    text: str
    """What was chosen, for a person."""


ExecutorFor = Callable[[Chain, frozenset[str], torch.device], Execution | str]
"""A chain, the inputs that need a gradient, where its tensors are -> how it runs, or the reason why it does not."""


def apply(chain: Chain, tensors: Mapping[str, Tensor], execute: Execute) -> Tensor:
    """Run a chain so that gradients reach the inputs that require one.

    Args:
        chain: What to run.
        tensors: For every input of the chain a tensor, as `execute` takes them.
        execute: Runs this chain, and the chains of its gradients.

    Returns:
        The output, [chain.shape(chain.output)].

    Raises:
        TypeError, ValueError: The tensors are not the chain's.
        GradientError: An input requires a gradient that is no chain; the message says why.
    """
    check_tensors(chain, tensors, float64=True)
    names = [tensor.name for tensor in chain.inputs]
    needs = frozenset(name for name in names if torch.is_grad_enabled() and tensors[name].requires_grad)
    if not needs:
        return execute(chain, tensors)
    output: Tensor = _Fused.apply(_planned(chain, needs), execute, *(tensors[name] for name in names))
    return output


_planned = functools.lru_cache(maxsize=1024)(gradients)  # a model has a few, and asks at every call


def forwards(plan: Gradients, execute: Execute, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Run a chain that `backwards` will differentiate.

    Args:
        plan: Of the chain.
        execute: Runs it.
        inputs: Of the chain, in its order.

    Returns:
        The output, and where `plan.saves_forward` what `backwards` needs: the output in fp32, where it is in fp16 or
        bf16, and the log-sum-exp of the chain's softmax.
    """
    tensors = _by_name(plan.chain, inputs)
    if not plan.saves_forward:
        return (execute(plan.chain, tensors),)
    exact, lse = execute(plan.chain, tensors, exact=True, save_lse=True)
    output = exact.to(_dtype(plan.chain, tensors))
    return (output, lse) if output is exact else (output, exact, lse)


def backwards(
    plan: Gradients, execute: Execute, inputs: Sequence[Tensor], saved: Sequence[Tensor], upstream: Tensor
) -> dict[str, Tensor]:
    """Differentiate a chain.

    Args:
        plan: Of the chain.
        execute: Runs the chains of its gradients.
        inputs: Of the chain, in its order.
        saved: The last two tensors that `forwards` returned if `plan.saves_forward`, else nothing.
        upstream: The gradient of the output.

    Returns:
        By name the gradients that the plan was asked for, but for those that are zero because nothing reads the input.
    """
    with torch.no_grad():
        return _Backward(plan, execute, inputs, saved).run(upstream)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Gradients, execute: Execute, *inputs: Tensor) -> Tensor:
        found = forwards(plan, execute, inputs)
        ctx.save_for_backward(*inputs, *(found[-2:] if plan.saves_forward else ()))
        ctx.plan, ctx.execute = plan, execute
        ctx.set_materialize_grads(False)
        return found[0]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        num_inputs = len(ctx.plan.chain.inputs)
        if upstream is None:
            return (None,) * (2 + num_inputs)
        kept = ctx.saved_tensors  # once: a checkpoint refuses to compute them twice
        inputs, saved = kept[:num_inputs], kept[num_inputs:]
        found = backwards(ctx.plan, ctx.execute, inputs, saved, upstream)
        if torch.is_grad_enabled():  # create_graph=True: say no when it is used, and only then
            found = {name: _Last.apply(gradient, upstream, *inputs) for name, gradient in found.items()}
        return (None, None, *(found.get(tensor.name) for tensor in ctx.plan.chain.inputs))


class _Last(torch.autograd.Function):
    """A gradient that depends on what it was made of, but in no way that could be differentiated."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *made_of: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> None:
        raise GradientError("the gradients of a fused chain cannot be differentiated again: run the chain unfused")


def _dtype(chain: Chain, tensors: Mapping[str, Tensor]) -> torch.dtype:
    return next(tensors[tensor.name].dtype for tensor in chain.inputs if tensor.name not in chain.boolean_inputs)


def _by_name(chain: Chain, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    return {tensor.name: value for tensor, value in zip(chain.inputs, inputs, strict=True)}


class _Backward:
    """One backward pass: what is known, by name, of stored values.

    They are in `cores` as their products leave them, in `values` complete, like the inputs; `gradients` are those of
    the former, `found` adds up those of the latter. `cores`, `lse` and `delta` are in fp32 at least.
    """

    def __init__(self, plan: Gradients, execute: Execute, inputs: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
        self.plan, self.execute, self.saved = plan, execute, saved
        self.values = _by_name(plan.chain, inputs)
        self.dtype = _dtype(plan.chain, self.values)
        self.cores: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self.lse: dict[str, Tensor] = {}
        self.delta: dict[str, Tensor] = {}
        self.statistics: dict[tuple[Statistic, str], Tensor] = {}
        self.found: dict[str, Tensor] = {}

    def run(self, upstream: Tensor) -> dict[str, Tensor]:
        """Gradients of the inputs that need one, by name."""
        for segment in self.plan.segments:
            if segment.needs_forward:
                self.forward(segment)
        self.found[self.plan.chain.output] = upstream
        for segment in reversed(self.plan.segments):
            if segment.value in self.found:
                self.backward(segment, self.found.pop(segment.value))
        return self.found

    def forward(self, segment: Segment) -> None:
        value, chain = segment.value, segment.forward
        if chain == self.plan.chain:
            self.cores[value], self.lse[value] = self.saved
            return
        tensors = {tensor.name: self.values[tensor.name] for tensor in chain.inputs}
        if segment.needs_lse:
            self.cores[value], self.lse[value] = self.execute(chain, tensors, exact=True, save_lse=True)
        else:
            self.cores[value] = self.execute(chain, tensors, exact=True)
        if value != self.plan.chain.output:
            complete = finish(self.plan.chain, segment.tail, self.cores[value], self.values)
            self.values[value] = complete.to(self.dtype)

    def backward(self, segment: Segment, gradient: Tensor) -> None:
        if segment.tail:
            gradient = self.through_tail(segment, gradient)
        self.gradients[segment.value] = gradient
        if segment.delta_over:
            axis = self.plan.chain.tensors[segment.value].index(segment.delta_over)
            self.delta[segment.value] = _sum_of_products(gradient, self.cores[segment.value], axis)
        for step in segment.steps:
            tensors = {name: self.tensor(segment, source, step.chain, name) for name, source in step.sources}
            part = self.execute(step.chain, tensors, exact=bool(step.summed))
            if step.summed:
                letters = step.chain.tensors[step.chain.output]
                part = part.sum([letters.index(letter) for letter in step.summed]).to(self.dtype)
            self.add(step.target, part)

    def through_tail(self, segment: Segment, gradient: Tensor) -> Tensor:
        """The gradient of the value as its product leaves it; those of the tail's operands are added up."""
        chain, anything = self.plan.chain, gradient.new_zeros(())
        operands = {
            name: self.values[name] if name in self.values else anything.expand(chain.shape(name))
            for name in epilogue_operands(chain, segment.value)
        }
        core = self.cores.get(segment.value, anything.expand(gradient.shape))
        wide = gradient.to(core.dtype)
        of_core, others = gradients_of_finish(chain, segment.tail, core, operands, wide, segment.tail_needs)
        for name, part in others.items():
            self.add(name, part)
        return of_core.to(self.dtype)

    def tensor(self, segment: Segment, source: Source, chain: Chain, name: str) -> Tensor:
        """What a chain of a segment reads under a name."""
        gradient = self.gradients[segment.value]
        match source.kind:
            case "input" | "value":
                return self.values[source.name]
            case "gradient":
                return gradient
            case "ones":
                return gradient.new_ones(chain.shape(name))
            case kind:
                return self.statistic(kind, segment.value, gradient.dtype)

    def statistic(self, kind: Statistic, value: str, dtype: torch.dtype) -> Tensor:
        """A part of a row statistic; chains of the same segment share it."""
        if (kind, value) not in self.statistics:
            exact = self.delta[value] if kind in ("neg_delta", "neg_delta_rest") else self.lse[value]
            self.statistics[kind, value] = _part(kind, exact, dtype)
        return self.statistics[kind, value]

    def add(self, target: str, part: Tensor) -> None:
        self.found[target] = self.found[target] + part if target in self.found else part


def _sum_of_products(narrow: Tensor, wide: Tensor, axis: int) -> Tensor:
    """Sums along an axis, in the wider type; to multiply mixed types takes thrice as long."""
    if narrow.dtype == wide.dtype:
        return (narrow * wide).sum(axis)
    return narrow.to(wide.dtype).mul_(wide).sum(axis)


def _part(kind: Statistic, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """A row statistic rounded to a dtype, or what that leaves of it; all of -inf is in the rest."""
    rounded = exact.to(dtype)
    match kind:
        case "lse":
            return rounded
        case "neg_lse":
            return -rounded.masked_fill(exact == -torch.inf, 0.0)
        case "neg_delta":
            return -rounded
        case "lse_rest":
            return (exact - rounded.to(exact.dtype).masked_fill(exact == -torch.inf, 0.0)).to(dtype)
        case "neg_delta_rest":
            return (rounded.to(exact.dtype) - exact).to(dtype)
