"""The model by hand on small schedules, and that it is traffic and flops over the device's rates for all others."""

from dataclasses import replace

import torch
from closeness import assert_equal_up_to_rounding
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion.plan import attention, gemm_chain
from fusion.plan.device import load_device
from fusion.plan.expression import expressions
from fusion.plan.performance_model import PerformanceModel
from fusion.plan.schedule import Schedule, schedule
from fusion.plan.traffic import traffic
from tests.fusion.drawn_chains import chains

CPU, A100 = load_device("cpu"), load_device("a100")
SLOW = replace(CPU, fp32_flops_per_s=1e6, dram_bytes_per_s=1e6, num_sms=6)  # a flop or byte takes a microsecond
CHAIN = gemm_chain(M=64, N=48, K=32, H=80)
TILES = {"M": 16, "N": 16, "K": 16, "H": 16}  # 4, 3, 2 and 5 rounds


def assert_us(found, expected):
    exact = torch.tensor(expected, dtype=torch.float64)
    assert_equal_up_to_rounding("time", torch.tensor(found, dtype=torch.float64), exact, roundings=4)


def test_the_formula_by_hand():
    found = PerformanceModel(CHAIN, SLOW).predict(schedule(CHAIN, "mhnk", TILES))
    A, B, D, E = 4 * 64 * 32, 4 * 32 * 48, 4 * 48 * 80, 4 * 64 * 80
    assert found.blocks == 4 * 5
    assert_us(found.memory_us, float(5 * 3 * A + 4 * 5 * B + 4 * D + E))
    assert_us(found.compute_us, float(5 * 2 * 64 * 48 * 32 + 2 * 64 * 48 * 80))
    assert found.slowdown == (20 + 6) / 20
    assert_us(found.total_us, (found.memory_us + found.compute_us) * 26 / 20)


def test_few_blocks_are_slow():
    model = PerformanceModel(CHAIN, SLOW)
    one = model.predict(schedule(CHAIN, "mhnk", CHAIN.sizes))
    assert (one.blocks, one.slowdown) == (1, 7)
    batched = gemm_chain(M=64, N=48, K=32, H=80, batch=9)
    nine = PerformanceModel(batched, SLOW).predict(schedule(batched, "mhnk", CHAIN.sizes))
    assert (nine.blocks, nine.slowdown) == (9, (9 + 6) / 9)
    assert_us(nine.memory_us, 9 * one.memory_us)
    assert_us(nine.compute_us, 9 * one.compute_us)


def test_hoisting_a_load_shows():
    """With all of K in a tile A is loaded once for each block, and with n in one tile too B and D as well."""
    model = PerformanceModel(CHAIN, SLOW)
    times = [
        model.predict(schedule(CHAIN, "mhnk", TILES | tiles)).memory_us for tiles in ({}, {"K": 32}, {"K": 32, "N": 48})
    ]
    A = 4 * 64 * 32
    assert_us(times[0] - times[1], float(5 * 2 * A))
    assert times[2] == times[1]


def test_a_gpu_fills_tiles_up_to_powers_of_two():
    chain, tiles = gemm_chain(M=96, N=96, K=96), {"M": 48, "N": 96, "K": 32}
    made = schedule(chain, "mnk", tiles)
    gpu, cpu = (PerformanceModel(chain, device).predict(made) for device in (A100, CPU))
    assert_us(gpu.compute_us, 1e6 * 2 * 2 * 64 * 3 * 128 * 32 / 19.5e12)
    assert_us(cpu.compute_us, 1e6 * 2 * 96**3 / 484e9)


def test_the_dtype_sets_the_peak():
    tiles = dict.fromkeys("MNK", 16)
    times = [
        PerformanceModel(chain, A100).predict(schedule(chain, "mnk", tiles)).compute_us
        for chain in (gemm_chain(M=64, N=64, K=64, dtype="fp32"), gemm_chain(M=64, N=64, K=64, dtype="fp16"))
    ]
    assert_us(times[0], times[1] * 312 / 19.5)


def test_an_empty_batch_takes_no_time():
    chain = attention(M=16, N=16, K=16, batch=0)
    found = PerformanceModel(chain, A100).predict(schedule(chain, "mhnk", dict.fromkeys("MNKH", 16)))
    assert (found.memory_us, found.compute_us, found.blocks, found.total_us) == (0, 0, 0, 0)


@settings(max_examples=50)
@given(chain=chains(max_size=60), data=st.data())
def test_times_are_traffic_and_flops_over_the_devices_rates(chain, data):
    model = PerformanceModel(chain, CPU)
    for _ in range(2):  # what the first prediction worked out serves the second
        expression = data.draw(st.sampled_from(expressions(chain)))
        tiles = {letter: data.draw(st.integers(1, chain.sizes[letter])) for letter in chain.loops}
        made = Schedule(expression, tuple(tiles.items()))
        program, found = made.program(chain), model.predict(made)
        done = traffic(chain, program, tiles)
        assert_us(found.memory_us, 1e6 * done.bytes / CPU.dram_bytes_per_s)
        assert_us(found.compute_us, 1e6 * done.padded_flops / CPU.fp32_flops_per_s)
        blocks = 1
        for extent in [extent for _, extent in program.grid] + [chain.sizes[letter] for letter in chain.batch]:
            blocks *= extent
        assert (found.blocks, found.slowdown) == (blocks, (blocks + CPU.num_sms) / blocks)
