"""Accumulators by hand: which ones exist at once, and how large they are then."""

import pytest

from fusion import attention, gemm_chain
from fusion.plan.device import load_device
from fusion.plan.registers import accumulator_registers, register_limit
from fusion.plan.schedule import schedule

TILES = {"M": 16, "N": 32, "K": 16, "H": 64, "P": 128}


def registers(chain, expression):
    plan = schedule(chain, expression, {letter: TILES[letter] for letter in chain.loops})
    return accumulator_registers(chain, plan.program(chain), dict(plan.tiles))


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("mhnk", 16 * 32 + 16 * 64),  # one tile of C, one of E
        ("mn(k,h)", 16 * 32 + 3 * 16 * 64),  # all three tiles of E along h
        ("mknh", 4 * 16 * 32 + 3 * 16 * 64),  # and all four of C along n, which a rule drops
    ],
)
def test_two_products(expression, expected):
    assert registers(gemm_chain(M=64, N=128, K=64, H=192), expression) == expected


def test_the_first_value_is_gone_when_the_third_product_runs():
    """C and E exist together, then E and G: with one tile of each, E and G are more."""
    chain = gemm_chain(M=64, N=32, K=64, H=64, P=128)
    assert registers(chain, "mphnk") == 16 * 64 + 16 * 128


def test_a_sum_exists_as_long_as_the_loop_around_it_turns():
    """G is summed over two tiles of h, so it exists while C and E are made again for the second."""
    chain = gemm_chain(M=64, N=64, K=64, H=128, P=128)
    assert registers(chain, "mphnk") == 16 * 32 + 16 * 64 + 16 * 128


def test_sums_may_take_three_quarters_of_the_registers():
    chain = gemm_chain(M=1024, N=1024, K=64, H=64, dtype="fp16")
    a100, mi300 = load_device("a100"), load_device("mi300")
    full = schedule(chain, "mhnk", {"M": 256, "N": 128, "K": 64, "H": 64})
    assert 0.75 * a100.registers_per_sm == 256 * 128 + 256 * 64
    assert register_limit(chain, full, a100) is None
    more = schedule(chain, "mhnk", {"M": 256, "N": 128, "K": 64, "H": 80})
    assert register_limit(chain, more, a100) == "needs 65536 registers for sums, above 49152"  # 80 becomes 128
    assert register_limit(chain, more, mi300) is None


def test_all_tiles_of_the_output_count_while_they_are_summed():
    chain = attention(M=512, N=512, K=512, heads=2, dtype="fp16")
    plan = schedule(chain, "mn(k,h)", {"M": 128, "N": 32, "K": 64, "H": 64})
    assert register_limit(chain, plan, load_device("h100")) == "needs 69632 registers for sums, above 49152"
    assert register_limit(chain, plan, load_device("cpu")) is None
