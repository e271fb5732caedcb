"""Tensors are those that a chain needs: names, shapes, dtypes, one device."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fusion.plan.chain import Chain

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def check_tensors(chain: Chain, tensors: Mapping[str, Tensor], *, float64: bool) -> None:
    """Check that tensors given by name are a chain's inputs.

    Args:
        chain: Which.
        tensors: For every input of the chain a tensor of its shape: bool for the boolean inputs, for the others the
            chain's dtype.
        float64: Whether float64 for all of the others is accepted as well.

    Raises:
        TypeError: A tensor has another dtype, or is no tensor.
        ValueError: A name is missing or unknown, a shape differs, or tensors lie on several devices.

    Source: our definition.
    """
    expected = [tensor.name for tensor in chain.inputs]
    if set(tensors) != set(expected):
        raise ValueError(f"tensors has the names {sorted(tensors)}; this chain needs {sorted(expected)}")
    not_tensors = [name for name in expected if not isinstance(tensors[name], Tensor)]
    if not_tensors:
        raise TypeError(
            f"tensors[{not_tensors[0]!r}] is a {type(tensors[not_tensors[0]]).__name__}; pass a torch.Tensor"
        )
    boolean = chain.boolean_inputs
    first_name = next(name for name in expected if name not in boolean)
    first, own = tensors[first_name], DTYPES[chain.dtype]
    number = torch.float64 if float64 and first.dtype == torch.float64 else own
    for name in expected:
        tensor, dtype = tensors[name], torch.bool if name in boolean else number
        if tensor.shape != chain.shape(name):
            dims = f"{name}[{','.join(chain.tensors[name])}]"
            raise ValueError(f"tensors[{name!r}] has shape {tuple(tensor.shape)}; {dims} is {chain.shape(name)} here")
        if tensor.dtype != dtype:
            other = ", or all of the rest as torch.float64" if float64 else ""
            raise TypeError(
                f"tensors[{name!r}] is {tensor.dtype}, not {dtype}; "
                f"pass masks as torch.bool and the rest as {own}{other}"
            )
        if tensor.device != first.device:
            raise ValueError(
                f"tensors[{name!r}] is on {tensor.device}, {first_name!r} on {first.device}; use one device"
            )
