"""The products that a core's matrix unit makes, and what they take."""

from dataclasses import replace

import pytest

from fusion import attention, gemm_chain
from fusion.plan import Chain, Dim, Input, MatMul, matrix_unit
from fusion.plan.cpu_model import CpuModel
from fusion.plan.device import load_device
from fusion.plan.gradient import gradients
from fusion.plan.schedule import schedule

TILES = {"M": 32, "N": 64, "K": 32, "H": 32}


def chain_of(dtype="bf16", M=256, N=256):
    return gemm_chain(M=M, N=N, K=128, H=128, dtype=dtype)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_it_multiplies_bf16_alone(dtype):
    assert matrix_unit.suits(chain_of(), TILES, "MNKH")
    assert not matrix_unit.suits(chain_of(dtype), TILES, "MNKH")


def test_tiles_along_a_sum_are_whole_unless_there_is_one():
    assert not matrix_unit.suits(chain_of(), TILES | {"K": 48}, "MNKH")
    assert not matrix_unit.suits(chain_of(), TILES | {"N": 16}, "MNKH")
    assert matrix_unit.suits(chain_of(), TILES | {"K": 48}, "MNH")


def test_gradients_of_attention_suit_it_and_a_value_that_a_product_reads_column_by_column_does_not():
    own = attention(M=64, N=64, K=32, H=32, heads=2, dtype="bf16")
    found = gradients(own, frozenset(tensor.name for tensor in own.inputs)).chains
    assert all(matrix_unit.suits(chain, dict.fromkeys(chain.loops, 64), "") for chain in found)
    dims = tuple(Dim(letter, 64) for letter in "MNKPH")
    inputs = (Input("A", "MK"), Input("B", "KN"), Input("D", "NP"), Input("G", "PH"))
    of_values = (MatMul("C", "A", "B", over="K"), MatMul("F", "D", "G", over="P"), MatMul("E", "C", "F", over="N"))
    assert not matrix_unit.suits(Chain(dims, inputs, of_values, "bf16"), dict.fromkeys("MNKPH", 64), "")


def test_cycles_grow_with_the_work_and_are_no_less_than_multiplying_takes():
    for rows, cols, depth in ((32, 32, 32), (64, 512, 64), (17, 33, 100), (256, 256, 1024)):
        tiles = -(-rows // 16) * -(-cols // 16) * -(-depth // 32)
        found = matrix_unit.cycles(rows, cols, depth, 0.0)
        assert found >= tiles * matrix_unit.TILE_CYCLES
        assert matrix_unit.cycles(2 * rows, cols, depth, 0.0) > found
        assert matrix_unit.cycles(rows, cols, 2 * depth, 0.0) > found


def test_what_lies_far_costs_more_and_small_tiles_are_near():
    cache_bytes = 2 << 20
    shares = [matrix_unit.far_share(held << 16, cache_bytes) for held in range(1, 80)]
    assert shares == sorted(shares)
    assert shares[0] == 0.0
    assert shares[-1] == 1.0
    near, half, far = (matrix_unit.cycles(256, 512, 128, share) for share in (0.0, 0.5, 1.0))
    assert near < half < far


def test_the_model_prefers_tiles_that_stay_near():
    device = replace(load_device("cpu"), arch="amx", shared_bytes_per_block=2 << 20)
    chain = chain_of(M=2048, N=512)
    model = CpuModel(chain, device)
    near, far = (
        model.predict(schedule(chain, "mn(k,h)", {"M": rows, "N": 512, "K": 128, "H": 128})) for rows in (64, 2048)
    )
    assert near.compute_us < far.compute_us


def test_the_model_takes_the_unit_for_faster_than_vectors():
    device = load_device("cpu")
    plan = schedule(chain_of(), "mn(k,h)", {"M": 64, "N": 128, "K": 128, "H": 128})
    vectors, unit = (CpuModel(chain_of(), replace(device, arch=arch)).predict(plan) for arch in ("avx512", "amx"))
    assert unit.compute_us < vectors.compute_us / 3
