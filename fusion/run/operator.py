"""The operators that torch's graphs see in place of a chain: `mcfuser::chain` and `mcfuser::chain_backward`.

A chain comes as its form (form.py); sizes are those of the tensors, so one node of a graph serves every size. Where the
executor refuses a chain at some size, and where there is nothing to compute, torch runs it product by product.

Source: not in the paper.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fusion.plan.chain import Chain
from fusion.plan.derived import GradientError
from fusion.plan.stages import Softmax
from fusion.run.autograd import backwards, forwards
from fusion.run.check import DTYPES
from fusion.run.executors import DEFAULT, Call, Described, by_itself, check, executors, plan_of, wanted_names
from fusion.run.form import of_shapes, read_form, sizes_of
from fusion.run.unfused import run_unfused


def call_chain(form: str, tensors: Sequence[Tensor], executor: str = DEFAULT) -> Tensor:
    """Run a chain, by one node in a graph of torch, so that gradients reach its inputs.

    Args:
        form: Of the chain, as `fusion.run.form.form_of` makes it.
        tensors: For every input of the chain, in its order, a tensor: bool for the boolean inputs, for the others the
            chain's dtype; any strides.
        executor: Name of what runs it, as `executors.add` got it.

    Returns:
        The output, contiguous.

    Raises:
        TypeError, ValueError: The tensors are not the chain's; the message names the input.
        GradientError: When the gradients are differentiated again.

    Source: not in the paper.
    """
    output: Tensor = torch.ops.mcfuser.chain(list(tensors), form, _needs_of(tensors), executor)[0]
    return output


def is_run(form: str, tensors: Sequence[Tensor], executor: str = DEFAULT) -> bool:
    """Whether an executor runs a chain, or leaves it to torch.

    Args:
        form: Of the chain.
        tensors: As for `call_chain`.
        executor: Name of the executor.

    Raises:
        TypeError, ValueError: As `call_chain`.

    Source: not in the paper.
    """
    return _call_of(tensors, form, _needs_of(tensors), executor).execute is not None


def is_due(form: str, tensors: Sequence[Tensor], executor: str = DEFAULT) -> bool:
    """Count a call, and say whether an executor that is to be patient is asked of the chain by now.

    Args:
        form: Of the chain.
        tensors: As for `call_chain`, of any dtype.
        executor: Name of the executor.

    Source: not in the paper.
    """
    return executors.is_due(form, _needs_of(tensors), executor, [tensor.shape for tensor in tensors])


def run_in_torch(form: str, tensors: Sequence[Tensor]) -> Tensor:
    """Run a chain product by product, with torch's own gradients.

    Args:
        form: Of the chain.
        tensors: As for `call_chain`.

    Source: not in the paper.
    """
    chain = of_shapes(form, [tensor.shape for tensor in tensors])
    names = [tensor.name for tensor in chain.inputs]
    return run_unfused(chain, dict(zip(names, tensors, strict=True)))


def needs_text(chain: Chain, names: frozenset[str]) -> str:
    """Which inputs need a gradient, as the operator takes it: a digit for each, 1 where it does.

    Args:
        chain: Whose inputs.
        names: Of those that do.

    Source: not in the paper.
    """
    return "".join("1" if tensor.name in names else "0" for tensor in chain.inputs)


def _needs_of(tensors: Sequence[Tensor]) -> str:
    is_on = torch.is_grad_enabled()
    return "".join("1" if is_on and tensor.requires_grad else "0" for tensor in tensors)


def _call_of(tensors: Sequence[Tensor], form: str, needs: str, executor: str) -> Call:
    described = tuple(Described(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors)
    return executors.call(form, needs, executor, described)


def run_forward(tensors: Sequence[Tensor], form: str, needs: str, executor: str) -> list[Tensor]:
    """What the operator does, without autograd.

    Args:
        tensors: As for `call_chain`.
        form: As for `call_chain`.
        needs: As `needs_text` makes it.
        executor: As for `call_chain`.

    Returns:
        The output, and what `run_backward` needs besides.

    Source: not in the paper.
    """
    call = _call_of(tensors, form, needs, executor)
    with _without_autocast(tensors[0].device.type):
        if call.execute is None:
            output = _apart_from(run_unfused(call.chain, call.named(tensors)), tensors)
            return [output, *_blank(call.chain, form, needs, tensors)]
        if call.plan is None:
            return [call.execute(call.chain, call.named(tensors)).contiguous()]
        return [tensor.contiguous() for tensor in forwards(call.plan, call.execute, tensors)]


def _without_autocast(device: str) -> AbstractContextManager[object]:
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def run_backward(
    gradient: Tensor, saved: Sequence[Tensor], tensors: Sequence[Tensor], form: str, needs: str, executor: str
) -> list[Tensor]:
    """What the gradients' operator does, without autograd.

    Args:
        gradient: Of the output.
        saved: What `run_forward` returned if that is more than the output.
        tensors: As for `run_forward`.
        form: As for `run_forward`.
        needs: As for `run_forward`.
        executor: As for `run_forward`.

    Returns:
        The gradients that are needed, in the order of the inputs.

    Source: not in the paper.
    """
    call = _call_of(tensors, form, needs, executor)
    wanted = wanted_names(call.chain, needs)
    with by_itself(gradient.device):
        if call.execute is None or call.plan is None:
            found = _torch_gradients(call, tensors, wanted, gradient)
        else:
            found = backwards(call.plan, call.execute, tensors, saved, gradient)
    results: list[Tensor] = []
    for name, tensor in call.named(tensors).items():
        if name in wanted:
            part = found[name] if name in found else torch.zeros_like(tensor)
            results.append(_apart_from(part.contiguous(), [gradient, *tensors, *saved, *results]))
    return results


def _torch_gradients(
    call: Call, tensors: Sequence[Tensor], wanted: frozenset[str], gradient: Tensor
) -> dict[str, Tensor]:
    with torch.enable_grad():
        leaves = {name: x.detach().requires_grad_(name in wanted) for name, x in call.named(tensors).items()}
        output = run_unfused(call.chain, leaves)
    names = sorted(wanted)
    parts = torch.autograd.grad(output, [leaves[name] for name in names], gradient, allow_unused=True)
    return {name: part for name, part in zip(names, parts, strict=True) if part is not None}


def _apart_from(tensor: Tensor, others: Sequence[Tensor]) -> Tensor:
    """An operator's result may share memory with nothing."""
    storages = {other.untyped_storage().data_ptr() for other in others if other.numel()}
    return tensor.clone() if tensor.numel() and tensor.untyped_storage().data_ptr() in storages else tensor


def _blank(chain: Chain, form: str, needs: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Room for what a backward pass would read, of a chain whose sizes may be symbols."""
    plan = plan_of(form, needs)
    if plan is None or not plan.saves_forward:
        return []
    sizes = sizes_of(chain, [tensor.shape for tensor in tensors])
    (softmax,) = (stage for stage in chain.stages if isinstance(stage, Softmax))
    kept = [] if chain.dtype == "fp32" else [chain.tensors[chain.output]]
    kept += [chain.tensors[softmax.x].replace(softmax.over, "")]
    return [tensors[0].new_zeros([sizes[letter] for letter in letters], dtype=torch.float32) for letters in kept]


def _fake_forward(tensors: list[Tensor], form: str, needs: str, executor: str) -> list[Tensor]:
    chain = read_form(form)
    sizes = sizes_of(chain, [tensor.shape for tensor in tensors])
    check(chain, tensors)
    shape = [sizes[letter] for letter in chain.tensors[chain.output]]
    return [tensors[0].new_empty(shape, dtype=DTYPES[chain.dtype]), *_blank(chain, form, needs, tensors)]


def _fake_backward(
    gradient: Tensor, saved: list[Tensor], tensors: list[Tensor], form: str, needs: str, executor: str
) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor, need in zip(tensors, needs, strict=True) if need == "1"]


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, ctx.form, ctx.needs, ctx.executor = inputs
    kept = output[-2:] if len(output) > 1 else []
    ctx.num_kept = len(kept)
    ctx.save_for_backward(*kept, *tensors)
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx: Any, gradients_of: Sequence[Tensor | None]) -> tuple[list[Tensor | None], None, None, None]:
    kept = ctx.saved_tensors  # once: a checkpoint computes them again for whoever asks, and refuses to do it twice
    saved, tensors = kept[: ctx.num_kept], kept[ctx.num_kept :]
    gradient = gradients_of[0]
    if gradient is None:
        return [None] * len(tensors), None, None, None
    found = iter(
        torch.ops.mcfuser.chain_backward(gradient, list(saved), list(tensors), ctx.form, ctx.needs, ctx.executor)
    )
    return [next(found) if need == "1" else None for need in ctx.needs], None, None, None


def _refuse(ctx: Any, *_: Any) -> None:
    raise GradientError("the gradients of a fused chain cannot be differentiated again: run the chain unfused")


def _define(library: torch.library.Library) -> None:
    flexible = (torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag)
    arguments = "Tensor[] tensors, str form, str needs, str executor"
    library.define(f"chain({arguments}) -> Tensor[]", tags=flexible)
    library.define(f"chain_backward(Tensor gradient, Tensor[] saved, {arguments}) -> Tensor[]", tags=flexible)
    for name, function, fake in (
        ("chain", run_forward, _fake_forward),
        ("chain_backward", run_backward, _fake_backward),
    ):
        library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"mcfuser::{name}", fake, lib=library)
    torch.library.register_autograd("mcfuser::chain", _differentiate, setup_context=_set_up, lib=library)
    torch.library.register_autograd("mcfuser::chain_backward", _refuse, lib=library)


_LIBRARY = torch.library.Library("mcfuser", "DEF")
_define(_LIBRARY)
