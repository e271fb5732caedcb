"""A C++ kernel on tensors of a CPU."""

import ctypes
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusion.emit.cpp.kernel import Kernel
from fusion.plan.chain import Chain
from fusion.run.check import DTYPES, check_tensors
from fusion.run.cpp.build import load
from fusion.run.cpp.instructions import InstructionSet

ALIGNMENT = 64  # bytes of a line of the cache
MAX_CALLS = 256  # whose preparation is kept: shapes may change with every call
_workspaces = threading.local()


class NativeKernel:
    """A compiled kernel.

    Source: not in the paper.
    """

    def __init__(self, kernel: Kernel, library: ctypes.CDLL) -> None:
        """Of a library that has been loaded.

        Args:
            kernel: That it holds.
            library: Compiled of its source.
        """
        self.kernel = kernel
        self._function = getattr(library, kernel.name)
        self._function.restype = None
        self._function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        self._floats = getattr(library, f"{kernel.name}_floats")
        self._floats.restype = ctypes.c_int64
        self._floats.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        self._read = [name for name, _ in kernel.tensors[: kernel.num_inputs]]
        self._calls: dict[Any, _Call] = {}

    def __call__(self, chain: Chain, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """Run it.

        Args:
            chain: The kernel's, with any sizes within its limits.
            tensors: For every input of the chain a tensor of its shape: bool for the boolean inputs, for the others
                the chain's dtype; any strides.

        Returns:
            What it writes: the output and, if it saves it, the log-sum-exp.

        Raises:
            TypeError: A tensor has another dtype, or is no tensor.
            ValueError: A name is missing or unknown, a shape differs, a size is beyond a limit, or a tensor is not on
                the CPU.
        """
        try:
            key = tuple([(x.shape, x.stride(), x.dtype, x.device) for x in map(tensors.__getitem__, self._read)])
            call = self._calls[key] if len(tensors) == len(self._read) else None
        except (KeyError, AttributeError):  # not seen before, or nothing that could be run
            call = None
        if call is None:
            call = self._prepare(chain, tensors)
        read = [tensors[name] for name in self._read]
        if True in call.copies:
            read = [tensor.contiguous() if copied else tensor for tensor, copied in zip(read, call.copies, strict=True)]
        written = [torch.empty(shape, dtype=dtype) for shape, dtype in call.written]
        if not call.is_empty:
            threads = torch.get_num_threads()
            workspace = _workspace(call.fixed_floats + threads * call.thread_floats)
            pointers = (ctypes.c_void_p * len(self.kernel.tensors))(*[x.data_ptr() for x in (*read, *written)])
            self._function(pointers, call.numbers, workspace, threads)
        return written

    def _prepare(self, chain: Chain, tensors: Mapping[str, Tensor]) -> "_Call":
        """Check tensors once for all that are like them."""
        check_tensors(chain, tensors, float64=False)
        sizes = chain.sizes
        for letter, most in self.kernel.limits:
            if sizes[letter] > most:
                raise ValueError(f"size of {letter} is {sizes[letter]}, above {most}, which this kernel's tile holds")
        for name, tensor in tensors.items():
            if tensor.device.type != "cpu":
                raise ValueError(f"tensors[{name!r}] is on {tensor.device}; a C++ kernel takes tensors on the CPU")
        read = [tensors[name] for name in self._read]
        copies = [tensor.dim() > 0 and tensor.size(-1) > 1 and tensor.stride(-1) != 1 for tensor in read]
        written = [
            ([sizes[letter] for letter in letters], DTYPES["fp32" if name in self.kernel.fp32 else chain.dtype])
            for name, letters in self.kernel.tensors[len(read) :]
        ]
        strides = [_contiguous(x.shape) if copied else x.stride() for x, copied in zip(read, copies, strict=True)]
        strides += [_contiguous(shape) for shape, _ in written]
        numbers = [*sizes.values(), *(stride for own in strides for stride in own)]
        in_numbers = (ctypes.c_int64 * len(numbers))(*numbers)
        fixed = self._floats(in_numbers, 0)
        call = _Call(
            in_numbers, tuple(copies), written, any(0 in shape for shape, _ in written), fixed,
            self._floats(in_numbers, 1) - fixed,
        )  # fmt: skip
        if len(self._calls) >= MAX_CALLS:
            self._calls.clear()
        self._calls[tuple((x.shape, x.stride(), x.dtype, x.device) for x in read)] = call
        return call


def compile_together(kernels: Sequence[Kernel], instructions: InstructionSet) -> list[NativeKernel]:
    """Compile kernels whose names differ as one library, and load it.

    Args:
        kernels: At least one.
        instructions: Of this machine.

    Raises:
        BuildError: They cannot be compiled.

    Source: not in the paper.
    """
    library = load("\n".join(kernel.source for kernel in kernels), instructions)
    return [NativeKernel(kernel, library) for kernel in kernels]


@dataclass(frozen=True)
class _Call:
    """What calls with tensors of the same shapes and strides have in common."""

    numbers: Any
    """Sizes and strides, as the kernel takes them."""
    copies: tuple[bool, ...]
    """Which tensors are not stored such that entries along their last dimension are adjacent."""
    written: list[tuple[list[int], torch.dtype]]
    is_empty: bool
    fixed_floats: int
    """Of the workspace, and beside it for each thread."""
    thread_floats: int


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a tensor that is stored in the order of its dimensions."""
    return tuple(math.prod(max(size, 1) for size in shape[index + 1 :]) for index in range(len(shape)))


def _workspace(floats: int) -> int:
    """Address of this thread's workspace, which grows as it has to and starts on a line of the cache."""
    held: Tensor | None = getattr(_workspaces, "held", None)
    if held is None or held.numel() < floats + ALIGNMENT:
        held = _workspaces.held = torch.empty(floats + ALIGNMENT, dtype=torch.float32)
    return -(-held.data_ptr() // ALIGNMENT) * ALIGNMENT
