"""The feed-forward layers of Mixture-of-Experts as chains: rows sorted by expert -> rows, forwards and backwards.

Legend: E experts, R rows sorted by expert, M model width, H hidden width, G width of the first map (H, or 2H if gated).

Source: not in the paper.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import cast, get_args

import torch
from torch import Tensor

from fusion.graph.activation import KNOWN
from fusion.plan.chain import Chain, DType
from fusion.plan.partition import last_alone, without_last
from fusion.plan.stages import Activation
from fusion.plan.workload import mlp
from fusion.run.check import DTYPES
from fusion.run.executors import DEFAULT
from fusion.run.form import form_of
from fusion.run.grouped import call_grouped, is_due_grouped, is_run_grouped


def feed_forward(
    rows_RM: Tensor,
    counts: Sequence[int],
    up_weight_EGM: Tensor,
    up_bias_EG: Tensor | None,
    down_weight_EMH: Tensor,
    down_bias_EM: Tensor | None,
    *,
    activation: Activation,
    gated: bool = False,
    executor: str = DEFAULT,
    otherwise: Callable[[], Tensor] | None = None,
) -> Tensor:
    """down(activation(up(x))) of every row by its expert; gated, down(activation(first half) * second half).

    What runs for an expert is one chain. Where the executor refuses that, each map is one; if gradients are needed the
    activation is then torch's, which keeps what it was applied to instead of computing it again.

    Args:
        rows_RM: Rows sorted by expert; cast to the weights' dtype, or to autocast's where that is on.
        counts: Rows per expert, summing to R.
        up_weight_EGM: First map of each expert, as nn.Linear stores it.
        up_bias_EG: Its biases, or None.
        down_weight_EMH: Second map.
        down_bias_EM: Its biases, or None where up_bias_EG is None.
        activation: Its name.
        gated: Whether the first map has two halves.
        executor: Name of what runs the chains.
        otherwise: Computes the result where the executor refuses the maps by themselves too; None leaves them to torch.

    Returns:
        rows_RM of results, in the dtype they were computed in.

    Raises:
        TypeError, ValueError: A tensor does not fit the others; the message names it.

    Source: not in the paper; the gated form is Shazeer (arXiv:2002.05202) equation 6.
    """
    _check(rows_RM, counts, up_weight_EGM, up_bias_EG, down_weight_EMH, down_bias_EM, gated=gated)
    autocast = torch.is_autocast_enabled(rows_RM.device.type)
    dtype = torch.get_autocast_dtype(rows_RM.device.type) if autocast else up_weight_EGM.dtype
    whole = _chain(activation, _dtype_name(dtype), gated=gated, bias=up_bias_EG is not None)
    given = {
        "A": rows_RM, **_halves(up_weight_EGM, up_bias_EG, gated=gated), "D": down_weight_EMH, "bias_E": down_bias_EM
    }  # fmt: skip
    if otherwise is not None and not is_due_grouped(form_of(whole), _of(whole, given), counts, executor):
        return otherwise()
    values = {name: None if tensor is None else tensor.to(dtype) for name, tensor in given.items()}
    run = functools.partial(_run, counts=counts, executor=executor)
    if is_run_grouped(form_of(whole), _of(whole, values), counts, executor):
        return run(whole, values)
    linear = last_alone(whole)
    up_EGM, up_EG = up_weight_EGM.to(dtype), None if up_bias_EG is None else up_bias_EG.to(dtype)
    first_map = {"C": values["A"], "D": up_EGM, "bias_E": up_EG}
    if otherwise is not None and not is_run_grouped(form_of(linear), _of(linear, first_map), counts, executor):
        return otherwise()
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (rows_RM, up_EGM, down_weight_EMH)):
        hidden_RG = run(linear, first_map)
        first, *second = hidden_RG.chunk(2, dim=-1) if gated else (hidden_RG,)
        hidden_RH = functools.reduce(torch.mul, second, KNOWN[activation](first))
    else:
        hidden_RH = run(without_last(whole), values)
    return run(linear, {"C": hidden_RH, "D": values["D"], "bias_E": values["bias_E"]})


def _run(chain: Chain, values: Mapping[str, Tensor | None], *, counts: Sequence[int], executor: str) -> Tensor:
    return call_grouped(form_of(chain), _of(chain, values), counts, executor)


def _of(chain: Chain, values: Mapping[str, Tensor | None]) -> list[Tensor]:
    found = [values[tensor.name] for tensor in chain.inputs]
    return [tensor for tensor in found if tensor is not None]


def _halves(weight_EGM: Tensor, bias_EG: Tensor | None, *, gated: bool) -> dict[str, Tensor | None]:
    """The first map as inputs of the chain: two products where it is gated."""
    if not gated:
        return {"B": weight_EGM, "bias_C": bias_EG}
    (first_EHM, second_EHM), biases = weight_EGM.unflatten(1, (2, -1)).unbind(1), (None, None)
    first_EH, second_EH = biases if bias_EG is None else bias_EG.unflatten(1, (2, -1)).unbind(1)
    return {"B": first_EHM, "bias_C": first_EH, "B_up": second_EHM, "bias_C_up": second_EH}


def _check(
    rows_RM: Tensor,
    counts: Sequence[int],
    up_weight_EGM: Tensor,
    up_bias_EG: Tensor | None,
    down_weight_EMH: Tensor,
    down_bias_EM: Tensor | None,
    *,
    gated: bool,
) -> None:
    """Every tensor fits the rows, the counts and the hidden width that the second map reads."""
    if (up_bias_EG is None) != (down_bias_EM is None):
        raise ValueError("up_bias_EG and down_bias_EM: got one of them; accepted are both or none")
    if down_weight_EMH.dim() != 3 or rows_RM.dim() != 2:
        raise ValueError(
            f"rows_RM and down_weight_EMH: got shapes {tuple(rows_RM.shape)} and {tuple(down_weight_EMH.shape)}; "
            "accepted are (rows, model width) and (experts, model width, hidden width)"
        )
    num_experts, width, hidden = len(counts), rows_RM.shape[1], down_weight_EMH.shape[2]
    first = 2 * hidden if gated else hidden
    expected = {
        "rows_RM": (rows_RM, (sum(counts), width)),
        "up_weight_EGM": (up_weight_EGM, (num_experts, first, width)),
        "up_bias_EG": (up_bias_EG, (num_experts, first)),
        "down_weight_EMH": (down_weight_EMH, (num_experts, width, hidden)),
        "down_bias_EM": (down_bias_EM, (num_experts, width)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(
                f"{name}: got shape {tuple(tensor.shape)}; accepted is {shape}, for counts={tuple(counts)}, rows of "
                f"{width}, a hidden width of {hidden} and gated={gated}"
            )
        if tensor.device != rows_RM.device:
            raise ValueError(f"{name}: got a tensor on {tensor.device}; accepted is rows_RM's device, {rows_RM.device}")


def _dtype_name(dtype: torch.dtype) -> DType:
    for name in get_args(DType):
        if DTYPES[name] == dtype:
            return cast(DType, name)
    raise TypeError(f"rows_RM: computed in {dtype}; accepted are {list(DTYPES.values())}")


@functools.cache
def _chain(activation: Activation, dtype: DType, *, gated: bool, bias: bool) -> Chain:
    return mlp(M=1, K=1, N=1, H=1, activation=activation, gated=gated, bias=bias, dtype=dtype)
