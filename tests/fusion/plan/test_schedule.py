"""A schedule in the paper's notation and the program that it stands for."""

import pytest

from fusion.plan import gemm_chain
from fusion.plan.expression import parse
from fusion.plan.placement import grid_loops, place
from fusion.plan.schedule import Schedule, schedule

CHAIN = gemm_chain(M=100, N=64, K=32, H=48)
TILES = {"M": 32, "N": 16, "K": 16, "H": 48}


def test_a_schedule_is_a_value_that_prints():
    made = schedule(CHAIN, "mn(k,h)", dict(reversed(TILES.items())), num_warps=8, num_stages=3)
    assert made == Schedule(parse("mn(k,h)"), tuple(TILES.items()), num_warps=8, num_stages=3)
    assert hash(made) == hash(schedule(CHAIN, "mn(k,h)", TILES, num_warps=8, num_stages=3))
    assert str(made) == "mn(k,h) | m32 n16 k16 h48 | 8 warps, 3 stages"
    assert made != schedule(CHAIN, "mhnk", TILES, num_warps=8, num_stages=3)


@pytest.mark.parametrize("text", ["mn(k,h)", "mhnk"])
def test_its_program_is_the_placement_on_the_loops_that_may_be_blocks(text):
    program = schedule(CHAIN, text, TILES).program(CHAIN)
    assert program == place(CHAIN, parse(text), TILES, grid=grid_loops(CHAIN, parse(text)))


@pytest.mark.parametrize(
    ("text", "tiles", "message"),
    [
        ("mnk", TILES, "expression='mnk' must have the loops 'mnkh', each once"),
        ("m(nk,h)", TILES, "the loops 'mnh' of E must nest"),
        ("mhnk", {"M": 1, "N": 1, "K": 1}, r"tiles\['H'\]=None must be a positive int"),
        ("mhnk", TILES | {"H": 0}, r"tiles\['H'\]=0 must be a positive int"),
        ("mhnk", TILES | {"H": True}, r"tiles\['H'\]=True must be a positive int"),
        ("mhnk?", TILES, "position 4 holds"),
    ],
)
def test_what_is_no_schedule_of_the_chain_is_refused(text, tiles, message):
    with pytest.raises(ValueError, match=message):
        schedule(CHAIN, text, tiles)
