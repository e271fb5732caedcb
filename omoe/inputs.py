"""What projectors take in of every expert's linear.

That is its mean input between two steps, or its mean output, observed by forward hooks; or the mean row, or column, of
its weight or its gradient, which need none.

Shapes: E experts, I input features (or output features, with side=output), R rows (tokens of all experts,
sorted by expert).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from omoe.config import OMoEConfig, Side
from omoe.experts import ExpertLinear


@dataclass(frozen=True)
class MeanInput:
    """What one expert linear saw since the last call of `MeanInputs.take`, or what `mean_rows` found.

    Source: our definition, section 4, item 1.
    """

    mean_EI: Tensor
    """Mean input of every expert in float32; zero for an expert without tokens or gradient, which leaves P as it is."""
    num_tokens_E: Tensor
    """Tokens of every expert, int64; zero where weights or gradients are the source."""


class MeanInputs:
    """Sums the inputs of experts' linears over every training forward, over data-parallel ranks at the end.

    A forward in evaluation mode does not count. One repeated in backward (activation checkpointing) counts again, which
    leaves a mean as it is.

    Args:
        expert_linears: Whose modules to observe.
        process_group: The ranks that hold copies of these experts and see other data; None sums over no ranks.
        side: Whether what goes into the linears is summed, or what comes out of them.

    Source: our definition, section 4, item 1; OWM (arXiv:1810.01256) takes the mean over the batch.
    """

    def __init__(
        self,
        expert_linears: Sequence[ExpertLinear],
        *,
        process_group: dist.ProcessGroup | None = None,
        side: Side = "input",
    ) -> None:
        self._linears = tuple(expert_linears)
        self._group = process_group
        self._side = side
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._observed: set[str] = set()
        self._handles = [
            module.register_forward_pre_hook(partial(self._observe, linear, expert))
            if side == "input"
            else module.register_forward_hook(partial(self._observe_output, linear, expert))
            for linear in self._linears
            for expert, module in enumerate(linear.modules)
        ]

    def observed(self, linear: ExpertLinear) -> bool:
        """Whether any training forward of this linear was ever seen.

        Source: not in the paper.
        """
        return linear.name in self._observed

    def take(self) -> dict[str, MeanInput]:
        """The mean inputs since the last call, by linear's name; then start over.

        Every rank of the process group must call it together.

        Source: our definition, section 4, the all-reduce of the pseudo-code.
        """
        for linear in self._linears:
            self._buffers(linear)
        if self._group is not None:
            _all_reduce(list(self._sums.values()), self._group)
            _all_reduce(list(self._counts.values()), self._group)
        taken = {
            linear.name: MeanInput(
                self._sums[linear.name] / self._counts[linear.name].clamp(min=1)[:, None], self._counts[linear.name]
            )
            for linear in self._linears
        }
        self.discard()
        return taken

    def discard(self) -> None:
        """Start over without looking.

        Source: not in the paper.
        """
        self._sums, self._counts = {}, {}

    def remove(self) -> None:
        """Take the hooks off the modules.

        Source: not in the paper.
        """
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _observe(self, linear: ExpertLinear, expert: int, module: nn.Module, inputs: tuple[object, ...]) -> None:
        if not module.training:
            return
        self._observed.add(linear.name)
        sum_EI, num_tokens_E = self._buffers(linear)
        if linear.observed == "choices":
            tokens_TI, expert_TK = _tokens_and_choices(linear, inputs)
            for index in range(linear.num_experts):
                chosen_T = (expert_TK == index).any(1)
                sum_EI[index] += tokens_TI[chosen_T].sum(0, dtype=torch.float32)
                num_tokens_E[index] += chosen_T.sum()
        elif linear.is_stacked:
            rows_RI, counts = _rows_and_counts(linear, inputs, self._width(linear))
            for index, expert_rows_RI in enumerate(rows_RI.split(counts)):
                sum_EI[index] += expert_rows_RI.sum(0, dtype=torch.float32)
            num_tokens_E += torch.tensor(counts, device=num_tokens_E.device)
        else:
            rows_RI = _rows(linear, inputs, self._width(linear))
            sum_EI[expert] += rows_RI.sum(0, dtype=torch.float32)
            num_tokens_E[expert] += rows_RI.shape[0]

    def _observe_output(
        self, linear: ExpertLinear, expert: int, module: nn.Module, inputs: tuple[object, ...], output: object
    ) -> None:
        self._observe(linear, expert, module, (output, *inputs[1:]))

    def _width(self, linear: ExpertLinear) -> int:
        return linear.shape_EOI[2 if self._side == "input" else 1]

    def _buffers(self, linear: ExpertLinear) -> tuple[Tensor, Tensor]:
        if linear.name not in self._sums:
            device = linear.parameters[0].device
            self._sums[linear.name] = torch.zeros(linear.num_experts, self._width(linear), device=device)
            self._counts[linear.name] = torch.zeros(linear.num_experts, dtype=torch.int64, device=device)
        return self._sums[linear.name], self._counts[linear.name]


@torch.no_grad()
def mean_rows(linear: ExpertLinear, config: OMoEConfig) -> MeanInput:
    """The mean row (I) of every expert's weight or gradient as it is now, in the place of a mean input.

    Args:
        linear: Whose; a gradient that is missing is zero.
        config: Which of the two is the source; side=output takes the mean column (O), in the place of a mean output.

    Source: our definition, section 4.1, source of the subspace (weight rows; gradients); not in the paper.
    """
    means = []
    for parameter in linear.parameters:
        matrix = parameter if config.source == "weights" else parameter.grad
        matrix = torch.zeros_like(parameter) if matrix is None else matrix
        means.append(matrix.mean(-2 if config.side == "input" else -1, dtype=torch.float32))
    num_tokens_E = torch.zeros(linear.num_experts, dtype=torch.int64, device=means[0].device)
    return MeanInput(torch.stack(means).view(linear.num_experts, -1), num_tokens_E)


def _rows(linear: ExpertLinear, inputs: tuple[object, ...], width: int) -> Tensor:
    if not inputs or not isinstance(inputs[0], Tensor) or inputs[0].ndim == 0 or inputs[0].shape[-1] != width:
        came = [tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__ for value in inputs]
        raise ValueError(
            f"inputs of {linear.name!r}: got {came}; its first positional input must be rows (..., {width}), and with "
            "side='output' what it returns"
        )
    return inputs[0].flatten(0, -2) if inputs[0].ndim > 1 else inputs[0][None]


def _tokens_and_choices(linear: ExpertLinear, inputs: tuple[object, ...]) -> tuple[Tensor, Tensor]:
    tokens_TI = _rows(linear, inputs, linear.shape_EOI[2])
    expert_TK = inputs[1] if len(inputs) > 1 else None
    if not isinstance(expert_TK, Tensor) or expert_TK.is_floating_point() or len(expert_TK) != len(tokens_TI):
        came = tuple(expert_TK.shape) if isinstance(expert_TK, Tensor) else type(expert_TK).__name__
        raise ValueError(
            f"choices of {linear.name!r}: got {came}; its second positional input must be the experts of each of its "
            f"{len(tokens_TI)} tokens, integers of shape (tokens, choices)"
        )
    return tokens_TI, expert_TK


def _rows_and_counts(linear: ExpertLinear, inputs: tuple[object, ...], width: int) -> tuple[Tensor, list[int]]:
    rows_RI = _rows(linear, inputs, width)
    counts_E = inputs[1] if len(inputs) > 1 else None
    counts = counts_E.tolist() if isinstance(counts_E, Tensor) else counts_E
    if not isinstance(counts, Sequence) or len(counts) != linear.num_experts or sum(counts) != rows_RI.shape[0]:
        raise ValueError(
            f"counts of {linear.name!r}: got {counts!r}; its second positional input must be {linear.num_experts} "
            f"integers, the rows of each expert, that sum to its {rows_RI.shape[0]} rows"
        )
    return rows_RI, [int(count) for count in counts]


def _all_reduce(tensors: list[Tensor], group: dist.ProcessGroup) -> None:
    """Sum every tensor over the ranks, in place, by one message."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat, group=group)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))
