"""Compiled kernels are kept: none is compiled twice, not even by the next run in the same folder."""

from pathlib import Path

from fusion import gemm_chain
from fusion.emit.triton import Kernel, emit
from fusion.plan.chain import Chain
from fusion.plan.device import Device, load_device
from fusion.plan.schedule import schedule
from fusion.run.triton.resources import CompileError, Compilers, Resources
from scripts.testbed.compiled_kernels import CompiledKernels

CHAIN = gemm_chain(M=64, N=64, K=64, dtype="fp16")
KERNEL = emit(CHAIN, schedule(CHAIN, "mnk", {"M": 32, "N": 32, "K": 32}))
FOUND = Resources(shared_bytes=4096, registers=40, spilled_bytes=0, num_warps=4, seconds=0.2)


class Counted(Compilers):
    """Compiles nothing, but counts; kernels of 8 warps do not compile."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def resources(self, kernel: Kernel, chain: Chain, device: Device) -> Resources:
        self.calls.append(f"{device.name} {kernel.num_warps}")
        if kernel.num_warps == 8:
            raise CompileError("too many")
        return FOUND


def test_each_kernel_is_compiled_once_for_each_architecture(tmp_path: Path) -> None:
    compilers = Counted()
    kernels = CompiledKernels(compilers, tmp_path / "compiled.jsonl")
    wide = emit(CHAIN, schedule(CHAIN, "mnk", {"M": 32, "N": 32, "K": 32}, num_warps=8))
    for _ in range(2):
        assert kernels.find(KERNEL, CHAIN, load_device("a100")) == FOUND
        assert kernels.find(KERNEL, CHAIN, load_device("mi300")) == FOUND
        assert kernels.find(wide, CHAIN, load_device("a100")) == "too many"
    assert compilers.calls == ["a100 4", "mi300 4", "a100 8"]


def test_a_run_goes_on_where_one_stopped_even_in_the_middle_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "compiled.jsonl"
    CompiledKernels(Counted(), path).find(KERNEL, CHAIN, load_device("a100"))
    line = path.read_text(encoding="utf-8")
    path.write_text(line + line[:20], encoding="utf-8")
    later = Counted()
    kernels = CompiledKernels(later, path)
    assert kernels.find(KERNEL, CHAIN, load_device("a100")) == FOUND
    assert kernels.find(KERNEL, CHAIN, load_device("h100")) == FOUND
    assert later.calls == ["h100 4"]
    assert CompiledKernels(Counted(), path).find(KERNEL, CHAIN, load_device("h100")) == FOUND
