"""Kernels compiled for devices that are not there: what they take, and what happens to those that do not compile."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from fusion import Chain, attention, gemm_chain
from fusion.emit.triton import Kernel, emit
from fusion.plan.device import load_device
from fusion.plan.schedule import schedule
from fusion.run.triton import resources as module
from fusion.run.triton.resources import CompileError, Compiler, CompilerMissingError, Compilers, Resources, resources

GPUS = ("a100", "rtx3080", "h100", "mi300")
PRODUCT = gemm_chain(M=256, N=256, K=256, dtype="fp16")
ATTENTION = attention(M=256, N=256, K=64, heads=4, dtype="fp16")


def product_kernel(*, num_stages: int = 3) -> Kernel:
    return emit(PRODUCT, schedule(PRODUCT, "mnk", {"M": 64, "N": 64, "K": 64}, num_stages=num_stages))


def broken(text: str) -> Kernel:
    """A kernel whose module begins with a statement."""
    kernel = product_kernel()
    return replace(kernel, source=f"{text}\n{kernel.source}")


@pytest.fixture(scope="module")
def compiler() -> Iterator[Compiler]:
    with Compiler() as compiler:
        yield compiler


@pytest.mark.parametrize(
    ("device", "buffers"),
    [("a100", 2), ("rtx3080", 2), ("h100", 3), ("mi300", 2)],
)
def test_shared_memory_is_the_tiles_on_their_way(compiler: Compiler, device: str, buffers: int) -> None:
    """Of both operands; warp-group products read them where they arrive, which takes a buffer more."""
    tiles_bytes = 2 * 64 * 64 * 2
    found = compiler.resources(product_kernel(), PRODUCT, load_device(device))
    assert found.shared_bytes == buffers * tiles_bytes
    assert found.num_warps == 4
    assert found.spilled_bytes == 0
    assert found.seconds > 0


def test_a_tile_too_large_for_its_threads_spills(compiler: Compiler) -> None:
    for device, tiles in (("a100", {"M": 128, "N": 64, "K": 16}), ("mi300", {"M": 256, "N": 128, "K": 16})):
        kernel = emit(PRODUCT, schedule(PRODUCT, "mnk", tiles, num_warps=1))
        assert compiler.resources(kernel, PRODUCT, load_device(device)).spilled_bytes > 0, device


def test_it_fits_up_to_the_devices_limit() -> None:
    device = load_device("a100")
    exact = Resources(device.shared_bytes_per_block, 32, 0, 4, 0.1)
    assert exact.fits(device)
    assert not replace(exact, shared_bytes=exact.shared_bytes + 1).fits(device)


def test_an_interpreted_process_compiles_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    tiles = {"M": 64, "N": 64, "K": 64, "H": 64}
    kernel = emit(ATTENTION, schedule(ATTENTION, "mhnk", tiles, num_warps=4, num_stages=2))
    found = resources(kernel, ATTENTION, load_device("a100"))
    assert 0 < found.shared_bytes <= 65536


def test_what_does_not_compile_says_why_in_a_few_lines_and_the_next_one_compiles(compiler: Compiler) -> None:
    device = load_device("a100")
    kernel = product_kernel()
    unknown = replace(kernel, source=kernel.source.replace("tl.dot(", "tl.dott("))
    with pytest.raises(CompileError, match="fused_C for a100: ") as error:
        compiler.resources(unknown, PRODUCT, device)
    assert "dott" in str(error.value)
    assert len(str(error.value).splitlines()) <= 6
    assert compiler.resources(kernel, PRODUCT, device).shared_bytes > 0


def test_a_compiler_that_dies_takes_nobody_along(compiler: Compiler) -> None:
    device = load_device("rtx3080")
    with pytest.raises(CompileError, match="the compiler died with status -6\nlast words"):
        compiler.resources(broken("import os; os.write(2, b'last words'); os.abort()"), PRODUCT, device)
    assert compiler.resources(product_kernel(), PRODUCT, device).shared_bytes > 0


def test_a_kernel_that_takes_too_long_is_given_up() -> None:
    device = load_device("rtx3080")
    with Compiler(timeout_s=0.5) as hasty, pytest.raises(CompileError, match=r"gave up after 0\.5 s"):
        hasty.resources(broken("while True: pass"), PRODUCT, device)


def test_several_threads_share_several_compilers() -> None:
    device = load_device("mi300")
    kernels = [product_kernel(num_stages=2), broken("raise ValueError('bad luck')"), product_kernel(num_stages=3)]
    with Compilers(2) as compilers, ThreadPoolExecutor(3) as threads:
        first, second, third = (threads.submit(compilers.resources, kernel, PRODUCT, device) for kernel in kernels)
        assert first.result().shared_bytes < third.result().shared_bytes
        with pytest.raises(CompileError, match="bad luck"):
            second.result()


@pytest.mark.parametrize("option", ["softmax", "odd sizes", "log-sum-exp", "mask"])
def test_kernels_of_every_kind_compile(compiler: Compiler, option: str) -> None:
    sizes = {"M": 100, "N": 90, "K": 33} if option == "odd sizes" else {"M": 128, "N": 128, "K": 32}
    chain: Chain = attention(**sizes, heads=2, keep="GMN" if option == "mask" else None, dtype="fp16")
    tiles = {"M": 64, "N": 64, "K": 48 if option == "odd sizes" else 32, "H": 48 if option == "odd sizes" else 32}
    kernel = emit(chain, schedule(chain, "mhnk", tiles), save_lse=option == "log-sum-exp")
    for device in GPUS:
        assert compiler.resources(kernel, chain, load_device(device)).registers > 0


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="device='cpu' is a cpu: kernels are compiled for the kinds cuda and hip"):
        resources(product_kernel(), PRODUCT, load_device("cpu"))
    with pytest.raises(ValueError, match="timeout_s=0: accepted is a positive number"):
        Compiler(timeout_s=0)
    with pytest.raises(ValueError, match="number=0: accepted is at least 1"):
        Compilers(0)


def test_without_triton_nothing_compiles_and_that_is_no_kernels_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "compiler.py"
    program.write_text("import triton_is_not_here", encoding="utf-8")
    monkeypatch.setattr(module, "PROGRAM", program)
    with pytest.raises(CompilerMissingError, match=r"install triton(.|\n)*triton_is_not_here"):
        resources(product_kernel(), PRODUCT, load_device("a100"))
