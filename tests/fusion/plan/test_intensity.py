"""The MBCI test: the paper's illustration, its formula by hand, and what holds for any sizes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion.plan import attention, gemm_chain, mlp
from fusion.plan.device import load_device
from fusion.plan.intensity import flops_per_byte, intensity

A100 = load_device("a100")
sizes = st.integers(1, 5000)


def test_phi_by_hand():
    assert flops_per_byte(128, 64, 32, 2) == 2 * 128 * 64 * 32 / (2 * (2 * 128 * 64 + 128 * 32 + 64 * 32))
    assert flops_per_byte(128, 64, 0, 2) == 0
    assert flops_per_byte(0, 0, 0, 2) == 0


def test_the_papers_illustration():
    """K falling from 1024 to 64 takes a product below the balance of an A100."""
    long = intensity(gemm_chain(M=1024, N=1024, K=1024, dtype="fp16"), A100)
    short = intensity(gemm_chain(M=1024, N=1024, K=64, dtype="fp16"), A100)
    assert long.balance_flops_per_byte == short.balance_flops_per_byte == 312e12 / 2039e9
    assert not long.is_mbci
    assert short.is_mbci
    assert short.memory_bound == ("C",)


def test_the_verdict_keeps_all_numbers_and_says_them():
    chain = attention(M=512, N=256, K=64, heads=12, dtype="fp16")
    verdict = intensity(chain, A100)
    assert [(found.value, found.tile, found.over) for found in verdict.products] == [
        ("C", (512, 256), 64),
        ("E", (512, 64), 256),
    ]
    C, E = (2 * 12 * (M * N + (M + N) * over) for M, N, over in ((512, 256, 64), (512, 64, 256)))
    softmax = 2 * 12 * 2 * 512 * 256
    assert verdict.unfused_flops_per_byte == chain.flops / (C + softmax + E)
    assert verdict.fused_flops_per_byte == chain.flops / chain.io_bytes
    assert str(verdict) == (
        "memory-bound in fp16 on a100: below its 153 flop/byte are C, E (products: C 26.95, E 39.38); "
        f"the chain has {verdict.unfused_flops_per_byte:.4g} unfused, {verdict.fused_flops_per_byte:.4g} fused"
    )


def test_a_chain_above_the_balance_is_compute_bound():
    verdict = intensity(gemm_chain(M=4096, N=4096, K=4096, H=4096, dtype="fp16"), A100)
    assert not verdict.is_mbci
    assert str(verdict).startswith("compute-bound in fp16 on a100: below its 153 flop/byte are none")


@given(M=sizes, N=sizes, K=sizes, H=sizes, tile=sizes, batch=st.integers(1, 4))
def test_no_tile_does_more_for_a_byte_than_whole_values(M, N, K, H, tile, batch):
    whole = intensity(gemm_chain(M=M, N=N, K=K, H=H, dtype="bf16"), A100)
    tiled = intensity(gemm_chain(M=M, N=N, K=K, H=H, batch=batch, dtype="bf16"), A100, tile=tile)
    for best, found in zip(whole.products, tiled.products, strict=True):
        assert all(size <= min(tile, of) for size, of in zip(found.tile, best.tile, strict=True))
        assert found.flops_per_byte <= best.flops_per_byte * (1 + 1e-12)
    assert set(whole.memory_bound) <= set(tiled.memory_bound)


@given(M=sizes, N=sizes, K=sizes, gated=st.booleans())
def test_fusion_never_lowers_the_intensity(M, N, K, gated):
    verdict = intensity(mlp(M=M, N=N, K=K, gated=gated, bias=True), load_device("cpu"))
    assert verdict.fused_flops_per_byte > verdict.unfused_flops_per_byte


def test_a_tile_must_be_positive():
    with pytest.raises(ValueError, match="tile=0 must be at least 1, or None"):
        intensity(gemm_chain(M=1, N=1, K=1), A100, tile=0)


def test_empty_chains_have_no_intensity():
    verdict = intensity(gemm_chain(M=0, N=5, K=5, H=3), A100)
    assert verdict.unfused_flops_per_byte == 0
