from dataclasses import replace

import pytest

from fusion import attention, gemm_chain
from fusion.plan.allocation import allocated_bytes
from fusion.plan.device import load_device
from fusion.plan.footprint import MAX_STAGES, SUMS_OF_A_THREAD, pipeline, shared_bytes
from fusion.plan.schedule import schedule

CHAIN = gemm_chain(M=1024, N=1024, K=512, H=512, dtype="fp16")


def test_warps_grow_with_the_sums_of_a_block() -> None:
    """C is 64 x 64 and E 64 x 64: 64 sums for each of 128 threads. With all four tiles of E along h it is 160."""
    device = load_device("a100")
    tiles = {"M": 64, "N": 64, "K": 32, "H": 64}
    assert pipeline(CHAIN, schedule(CHAIN, "mhnk", tiles), device)[0] == 4
    wide = gemm_chain(M=1024, N=1024, K=512, H=256, dtype="fp16")
    assert pipeline(wide, schedule(wide, "mn(k,h)", tiles), device)[0] == 8
    assert pipeline(wide, schedule(wide, "mn(k,h)", tiles), load_device("mi300"))[0] == 4
    assert 64 <= SUMS_OF_A_THREAD < 160


@pytest.mark.parametrize("name", ["a100", "rtx3080", "h100", "mi300"])
def test_stages_are_the_most_that_fit(name: str) -> None:
    device = load_device(name)
    for tile in (16, 64, 128, 256):
        plan = schedule(CHAIN, "mhnk", {"M": tile, "N": tile, "K": 64, "H": tile})
        warps, stages = pipeline(CHAIN, plan, device)
        fits = [
            number
            for number in range(2, MAX_STAGES[device.kind] + 1)
            if allocated_bytes(CHAIN, replace(plan, num_warps=warps, num_stages=number), device)
            <= device.shared_bytes_per_block
        ]
        assert stages == max(fits, default=1)


def test_its_own_warps_and_stages_do_not_count() -> None:
    device, tiles = load_device("h100"), {"M": 64, "N": 64, "K": 64, "H": 64}
    plans = [schedule(CHAIN, "mhnk", tiles, num_warps=warps, num_stages=stages) for warps, stages in ((4, 1), (8, 3))]
    assert len({pipeline(CHAIN, plan, device) for plan in plans}) == 1


def test_a_cpu_keeps_the_tiles_that_products_read() -> None:
    chain = attention(M=100, N=200, K=48, H=32)
    plan = schedule(chain, "mnkh", {"M": 16, "N": 32, "K": 48, "H": 32})
    assert shared_bytes(chain, plan, load_device("cpu")) == 4 * (16 * 48 + 32 * 48 + 32 * 32)
    assert pipeline(chain, plan, load_device("cpu")) == (1, 1)


def test_a_gpu_asks_for_what_its_kernel_allocates() -> None:
    device = load_device("a100")
    plan = schedule(CHAIN, "mhnk", {"M": 64, "N": 64, "K": 64, "H": 64}, num_stages=2)
    assert shared_bytes(CHAIN, plan, device) == allocated_bytes(CHAIN, plan, device) > 0
