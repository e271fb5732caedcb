"""A chain once for each group of rows: rows of all groups lie one behind the other, all other tensors are stacked.

One form serves every number of rows; an executor that plans for intervals of sizes plans a few times for all groups.

Source: not in the paper; grouped products as in Mixture-of-Experts layers.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusion.run.executors import DEFAULT
from fusion.run.form import read_form
from fusion.run.operator import is_due, is_run, run_backward, run_forward, run_in_torch

ROWS = "M"  # the letter of the dimension that groups have different sizes of


def call_grouped(form: str, tensors: Sequence[Tensor], counts: Sequence[int], executor: str = DEFAULT) -> Tensor:
    """Run a chain for every group, so that gradients reach its inputs.

    Args:
        form: Of the chain of one group; its rows are the letter M, first of every tensor that has it.
        tensors: For every input of the chain, in its order: with M, [all rows, ...], else [groups, ...].
        counts: Rows of each group, which sum to all rows.
        executor: Name of what runs the chains.

    Returns:
        [all rows, ...].

    Raises:
        TypeError, ValueError: The tensors are not the chain's, or the counts are not theirs; the message names them.

    Source: not in the paper.
    """
    _check(form, tensors, counts)
    if not is_run_grouped(form, tensors, counts, executor):  # then torch's own gradients compute nothing again
        return torch.cat([run_in_torch(form, group) for group in _groups(form, tensors, counts)])
    is_on = torch.is_grad_enabled()
    needs = "".join("1" if is_on and tensor.requires_grad else "0" for tensor in tensors)
    output: Tensor = _Grouped.apply(form, needs, executor, tuple(counts), *tensors)
    return output


def is_run_grouped(form: str, tensors: Sequence[Tensor], counts: Sequence[int], executor: str = DEFAULT) -> bool:
    """Whether an executor runs a chain for the group with the most rows, or leaves it to torch.

    Args:
        form: As for `call_grouped`.
        tensors: As for `call_grouped`.
        counts: As for `call_grouped`.
        executor: As for `call_grouped`.

    Raises:
        TypeError, ValueError: As `call_grouped`.

    Source: not in the paper.
    """
    _check(form, tensors, counts)
    return is_run(form, _largest(form, tensors, counts), executor)


def is_due_grouped(form: str, tensors: Sequence[Tensor], counts: Sequence[int], executor: str = DEFAULT) -> bool:
    """Count a call, and say whether an executor that is to be patient is asked of the largest group's chain by now.

    Args:
        form: As for `call_grouped`.
        tensors: As for `call_grouped`, of any dtype.
        counts: As for `call_grouped`.
        executor: As for `call_grouped`.

    Source: not in the paper.
    """
    return is_due(form, _largest(form, tensors, counts), executor)


def _check(form: str, tensors: Sequence[Tensor], counts: Sequence[int]) -> None:
    for tensor, given in zip(read_form(form).inputs, tensors, strict=True):
        expected = sum(counts) if ROWS in tensor.dims else len(counts)
        if given.dim() == 0 or len(given) != expected:
            kind = f"{expected} rows" if ROWS in tensor.dims else f"{expected} groups"
            raise ValueError(
                f"tensors[{tensor.name!r}] has shape {tuple(given.shape)}; counts={tuple(counts)} makes it {kind} long"
            )


def _largest(form: str, tensors: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """The tensors of the group with the most rows."""
    return _groups(form, tensors, counts)[max(range(len(counts)), key=counts.__getitem__)]


def _groups(form: str, tensors: Sequence[Tensor], counts: Sequence[int]) -> list[list[Tensor]]:
    """The tensors of each group; no copies."""
    parts = [
        tensor.split(list(counts)) if ROWS in given.dims else tensor.unbind(0)
        for given, tensor in zip(read_form(form).inputs, tensors, strict=True)
    ]
    return [list(group) for group in zip(*parts, strict=True)]


def _starts(counts: Sequence[int]) -> list[int]:
    return [0, *accumulate(counts)][:-1]


class _Grouped(torch.autograd.Function):
    """Every group writes its part of one buffer, forwards and backwards."""

    @staticmethod
    def forward(ctx: Any, form: str, needs: str, executor: str, counts: tuple[int, ...], *tensors: Tensor) -> Tensor:
        ctx.form, ctx.needs, ctx.executor, ctx.counts = form, needs, executor, counts
        saved: list[list[Tensor]] = []
        whole: Tensor | None = None
        for group, start, rows in zip(_groups(form, tensors, counts), _starts(counts), counts, strict=True):
            found = run_forward(group, form, needs, executor)
            if whole is None:
                whole = found[0].new_empty((sum(counts), *found[0].shape[1:]))
            whole[start : start + rows].copy_(found[0])  # while it is in the caches, and its memory serves the next
            saved.append(found if len(found) > 1 else [])
        ctx.lengths = [len(kept) for kept in saved]
        ctx.save_for_backward(*tensors, *(tensor for kept in saved for tensor in kept))
        assert whole is not None
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        inputs = read_form(ctx.form).inputs
        every = ctx.saved_tensors  # once: a checkpoint refuses to compute them twice
        tensors, kept = every[: len(inputs)], list(every[len(inputs) :])
        wanted = [index for index, need in enumerate(ctx.needs) if need == "1"]
        found: dict[int, Tensor] = {index: torch.empty_like(tensors[index]) for index in wanted}
        into = _groups(ctx.form, [found.get(index, tensor) for index, tensor in enumerate(tensors)], ctx.counts)
        parts = zip(_groups(ctx.form, tensors, ctx.counts), into, upstream.split(ctx.counts), ctx.lengths, strict=True)
        for group, to, gradient, length in parts:
            saved, kept = kept[:length], kept[length:]
            gradients = run_backward(gradient, saved, group, ctx.form, ctx.needs, ctx.executor)
            for index, part in zip(wanted, gradients, strict=True):
                to[index].copy_(part)
        return (None, None, None, None, *(found.get(index) for index in range(len(tensors))))
