from dataclasses import replace

from fusion import attention, gemm_chain
from fusion.plan.cpu_model import CpuModel, best_micro, step_cycles
from fusion.plan.device import load_device
from fusion.plan.schedule import schedule

CPU = load_device("cpu")
CHAIN = gemm_chain(M=512, N=512, K=128, H=128)
TILES = {"M": 96, "N": 256, "K": 128, "H": 128}


def test_few_sums_wait_for_each_other_and_many_keep_both_units_busy():
    assert step_cycles(1, 1) == step_cycles(2, 2) == 4
    assert step_cycles(6, 4) / 24 < step_cycles(8, 2) / 16 < step_cycles(4, 1) / 4


def test_time_is_at_least_that_of_the_multiplications():
    predicted = CpuModel(CHAIN, CPU).predict(schedule(CHAIN, "mn(k,h)", TILES))
    assert predicted.compute_us > 1e6 * CHAIN.flops / CPU.fp32_flops_per_s


def test_thin_tiles_and_blocks_that_do_not_share_out_cost_more():
    model = CpuModel(CHAIN, CPU)
    good = model.predict(schedule(CHAIN, "mn(k,h)", TILES)).total_us
    assert model.predict(schedule(CHAIN, "mn(k,h)", TILES | {"N": 16, "K": 16})).total_us > good
    assert model.predict(schedule(CHAIN, "mn(k,h)", TILES | {"M": 512})).slowdown == 2.0


def test_a_causal_mask_saves_about_half():
    full, causal = (attention(M=1024, N=1024, K=64, causal=causal) for causal in (False, True))
    tiles = {"M": 64, "N": 128, "K": 64, "H": 64}
    times = [CpuModel(chain, CPU).predict(schedule(chain, "mn(k,h)", tiles)).compute_us for chain in (full, causal)]
    assert 0.45 < times[1] / times[0] < 0.65


def test_the_register_block_suits_the_tile():
    assert best_micro(CHAIN, schedule(CHAIN, "mn(k,h)", TILES), CPU) == (6, 4)
    narrow = gemm_chain(M=512, N=96, K=128, H=96)
    plan = schedule(narrow, "mn(k,h)", {"M": 64, "N": 96, "K": 128, "H": 96})
    assert best_micro(narrow, plan, replace(CPU, warp_size=16)) == (8, 3)
