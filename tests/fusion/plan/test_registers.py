"""Accumulators by hand: which ones exist at once, and how large they are then."""

import pytest

from fusion import gemm_chain
from fusion.plan.registers import accumulator_registers
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
