"""What the compiler is told of arguments is what Triton's own launcher tells it."""

from dataclasses import replace

import pytest
import torch
from triton._C.libtriton import native_specialize_impl
from triton.backends.amd.compiler import HIPBackend
from triton.backends.nvidia.compiler import CUDABackend

from fusion import Chain, attention, mlp
from fusion.emit.triton import Kernel
from fusion.plan.device import load_device
from fusion.run.check import DTYPES
from fusion.run.triton.signature import signature

CHAINS = {
    "even": attention(M=64, N=32, K=16, batch=2, heads=4, kv_heads=2, mask="MN", keep="ZN", dtype="fp16"),
    "odd": attention(M=7, N=33, K=5, batch=1, keep="ZMN", dtype="bf16"),
    "single columns": mlp(M=48, K=1, N=1, H=1, bias=True),
}


def kernel(chain: Chain) -> Kernel:
    """A kernel without a text that takes a chain's tensors and saves a log-sum-exp."""
    letters = tuple((name, chain.tensors[name]) for name in (*(x.name for x in chain.inputs), chain.output))
    return Kernel("k", "", (*letters, ("lse", "M")), frozenset({chain.output, "lse"}), 1, 4, 1)


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize(("device", "backend"), [("a100", CUDABackend), ("mi300", HIPBackend)])
def test_it_is_the_launchers(name: str, device: str, backend: type) -> None:
    chain = CHAINS[name]
    told = signature(kernel(chain), chain, load_device(device))
    tensors = {}
    for tensor, letters in kernel(chain).tensors:
        dtype = torch.float32 if tensor in (chain.output, "lse") else DTYPES[chain.dtype]
        dtype = torch.bool if tensor in chain.boolean_inputs else dtype
        tensors[tensor] = torch.empty([chain.sizes[letter] for letter in letters], dtype=dtype)
    values = {f"{tensor}_ptr": values for tensor, values in tensors.items()}
    for tensor, letters in kernel(chain).tensors:
        strides = zip(letters, tensors[tensor].stride(), strict=True)
        values |= {f"{tensor}_{letter}_stride": stride for letter, stride in strides}
    assert list(told["signature"]) == list(kernel(chain).arguments)
    for argument in kernel(chain).arguments:
        kind, key = native_specialize_impl(backend, values[argument], False, True, True)
        assert told["signature"][argument] == kind, argument
        assert told["constants"].get(argument) == (key if kind == "constexpr" else None), argument
        attributes = [] if kind == "constexpr" else backend.parse_attr(key or "")  # type: ignore[attr-defined]
        assert told["attributes"].get(argument, []) == attributes, argument


def test_strides_beyond_32_bits_are_64_bits_wide_and_large_tensors_have_no_small_offsets() -> None:
    chain = attention(M=2**17, N=2**15, K=16, batch=4, mask="ZMN", dtype="fp16")
    told = signature(kernel(chain), chain, load_device("mi300"))
    assert told["signature"]["mask_Z_stride"] == "i64"
    assert told["signature"]["mask_M_stride"] == "i32"
    assert told["attributes"]["mask_ptr"] == [["tt.divisibility", 16]]
    assert told["attributes"]["A_ptr"] == [["tt.divisibility", 16], ["tt.pointer_range", 32]]


def test_a_stride_of_one_is_a_constant_wherever_it_stands() -> None:
    chain = replace(CHAINS["single columns"])
    told = signature(kernel(chain), chain, load_device("a100"))
    assert told["constants"]["A_M_stride"] == told["constants"]["A_K_stride"] == 1
