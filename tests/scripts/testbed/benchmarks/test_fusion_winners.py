"""Winners are checked on fewer blocks of the same program; a wrong kernel is found out."""

from dataclasses import replace
from pathlib import Path

import pytest

from configs.kernels import KernelsSection
from fusion import attention, gemm_chain
from fusion.emit.triton import Kernel
from fusion.plan.chain import Chain
from fusion.plan.device import Device, load_device
from fusion.plan.schedule import schedule
from fusion.run.triton.resources import Compilers, Resources
from scripts.testbed.benchmarks import fusion_winners
from scripts.testbed.benchmarks.fusion_winners import is_right, scaled, winner
from scripts.testbed.compiled_kernels import CompiledKernels

ATTENTION = attention(M=208, N=512, K=64, heads=8, dtype="fp16")
ONE = schedule(ATTENTION, "mhnk", {"M": 64, "N": 64, "K": 64, "H": 32})


def test_two_tiles_are_left_of_each_loop_and_the_last_is_as_full_as_it_was() -> None:
    small = scaled(ATTENTION, ONE)
    assert small.sizes == {"G": 2, "M": 64 + 16, "N": 128, "K": 64, "H": 64}
    program, whole = ONE.program(small), ONE.program(ATTENTION)
    assert [statement for statement, _ in program.walk()] == [statement for statement, _ in whole.walk()]
    paths = [["".join(loop.letter for loop in loops) for _, loops in one.walk()] for one in (program, whole)]
    assert paths[0] == paths[1]


def test_the_emitted_kernel_is_right_and_another_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    small = scaled(ATTENTION, ONE)
    assert is_right(small, ONE, seed=1)

    def off(chain: Chain, one: object) -> Kernel:
        kernel = emit(chain, one)
        return replace(kernel, source=kernel.source.replace("tl.exp(", "tl.exp2("))

    emit = fusion_winners.emit
    monkeypatch.setattr(fusion_winners, "emit", off)
    assert not is_right(small, ONE, seed=1)


class Choosy(Compilers):
    """Compiles nothing: kernels with a tile of A of more than 32 rows spill, those with fewer than 32 do not fit."""

    def __init__(self) -> None:
        pass

    def resources(self, kernel: Kernel, chain: Chain, device: Device) -> Resources:
        rows = int(kernel.source.split("i_M = tl.arange(0, ")[1].split(")")[0])
        shared_bytes = device.shared_bytes_per_block + (rows < 32)
        return Resources(shared_bytes, 64, 4 * (rows > 32), kernel.num_warps, 0.1)


def test_a_candidate_that_spills_or_does_not_fit_never_wins(tmp_path: Path) -> None:
    chain, device = gemm_chain(M=256, N=128, K=64, H=64, dtype="fp16"), load_device("a100")
    kernels = CompiledKernels(Choosy(), tmp_path / "compiled.jsonl")
    found = winner("small", chain, device, KernelsSection(population=32, top=4), kernels, seed=1)
    assert dict(found.schedule.tiles)["M"] == 32
    assert found.compiled.spilled_bytes == 0
    assert {reason for reason, _ in found.refused} >= {"spills registers", "compiled, does not fit"}
    assert found.predicted_us > 0
