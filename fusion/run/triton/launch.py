"""A kernel on tensors: on a GPU, or in Triton's interpreter on any device."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fusion.emit.triton import Kernel
from fusion.plan.chain import Chain
from fusion.run.check import DTYPES, check_tensors
from fusion.run.triton.loader import load

LONGEST_TILE = 1024  # along one letter; a kernel counts in 32 bits inside a tile, in 64 from one to the next


def launch(kernel: Kernel, chain: Chain, tensors: Mapping[str, Tensor]) -> Tensor:
    """Run a kernel.

    Args:
        kernel: Of the chain.
        chain: What it computes.
        tensors: For every input of the chain a tensor of its shape: bool for the boolean inputs, for the others the
            chain's dtype; any strides; all on one CUDA device, or anywhere with TRITON_INTERPRET=1 in the environment.

    Returns:
        The output, [chain.shape(chain.output)], in the chain's dtype, or in fp32 of a kernel emitted with exact=True.

    Raises:
        TypeError: A tensor has another dtype, or is no tensor.
        ValueError: A name is missing or unknown, a shape differs, tensors lie on several devices, or a stride is too
            large.
        RuntimeError: There is neither a CUDA device under the tensors nor the interpreter.

    Source: not in the paper.
    """
    return _launch(kernel, chain, tensors)[0]


def launch_with_lse(kernel: Kernel, chain: Chain, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Run a kernel that saves the log-sum-exp of its softmax.

    Args:
        kernel: Of the chain, emitted with save_lse=True.
        chain: What it computes.
        tensors: As for `launch`.

    Returns:
        The output as of `launch`, and the log-sum-exp [batch's letters and rows'], fp32, natural logarithm.

    Raises:
        TypeError, ValueError, RuntimeError: As `launch`.

    Source: not in the paper, which has no backward pass.
    """
    output, lse = _launch(kernel, chain, tensors)
    return output, lse


def _launch(kernel: Kernel, chain: Chain, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    check_tensors(chain, tensors, float64=False)
    device = tensors[chain.inputs[0].name].device
    _check_device(device)
    written = [
        torch.empty(
            [chain.sizes[letter] for letter in letters],
            dtype=DTYPES["fp32" if name in kernel.fp32 else chain.dtype],
            device=device,
        )
        for name, letters in kernel.tensors
        if name not in tensors
    ]
    passed = [*(tensors[name] for name, _ in kernel.tensors if name in tensors), *written]
    _check_strides(kernel, passed)
    strides = [stride for tensor in passed for stride in tensor.stride()]
    if kernel.programs > 0:
        load(kernel)[(kernel.programs,)](*passed, *strides, num_warps=kernel.num_warps, num_stages=kernel.num_stages)
    return written


def _check_device(device: torch.device) -> None:
    from triton import knobs

    if device.type != "cuda" and not knobs.runtime.interpret:
        raise RuntimeError(
            f"tensors are on {device}, where Triton has no compiler; move them to a CUDA device, or set "
            "TRITON_INTERPRET=1 in the environment to run the kernel in Triton's interpreter, slowly"
        )


def _check_strides(kernel: Kernel, passed: Sequence[Tensor]) -> None:
    for (name, letters), tensor in zip(kernel.tensors, passed, strict=True):
        for letter, size, stride in zip(letters, tensor.shape, tensor.stride(), strict=True):
            if (min(size, LONGEST_TILE) - 1) * stride >= 2**31:
                raise ValueError(
                    f"tensors[{name!r}] has a stride of {stride} along {letter}, with which a tile spans 2**31 entries "
                    f"or more; pass it stored otherwise, as .contiguous() does"
                )
