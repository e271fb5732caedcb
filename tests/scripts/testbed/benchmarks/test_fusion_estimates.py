"""An estimate is right where it decides as the compiled kernel does."""

from dataclasses import replace

import pytest

from fusion import gemm_chain
from fusion.plan.device import load_device
from fusion.plan.space import search_space
from scripts.testbed.benchmarks.fusion_estimates import Estimate, draw, share

ONE = Estimate(device="a100", limit=100, estimated=80, operands=110, compiled=90)


@pytest.mark.parametrize(
    ("estimated", "operands", "compiled", "right", "rule_right", "operands_right"),
    [
        (80, 110, 90, True, True, False),
        (101, 121, 100, False, False, False),
        (101, 120, 101, True, False, True),
        (100, 100, 101, False, False, False),
    ],
)
def test_what_is_right(
    estimated: int, operands: int, compiled: int, right: bool, rule_right: bool, operands_right: bool
) -> None:
    one = replace(ONE, estimated=estimated, operands=operands, compiled=compiled)
    assert (one.is_right, one.is_rule_right, one.is_operands_right) == (right, rule_right, operands_right)


def test_errors_are_relative_to_what_was_compiled() -> None:
    assert replace(ONE, estimated=90).error == 0
    assert replace(ONE, estimated=45).error == 0.5
    assert replace(ONE, compiled=0, estimated=0).error == 0
    assert share([True, False, True, True]) == 0.75


def test_candidates_are_the_spaces_and_their_choice_is_the_seeds() -> None:
    space = search_space(gemm_chain(M=256, N=256, K=128, H=64, dtype="fp16"), load_device("mi300"))
    found = draw(space, 50, seed=3)
    every = {(region.expression, tiles) for region in space.regions for tiles in space.tiles(region)}  # rule 4 included
    assert len(found) == 50
    assert {(one.expression, tuple(size for _, size in one.tiles)) for one in found} <= every
    assert found == draw(space, 50, seed=3)
    assert found != draw(space, 50, seed=4)
    assert len(set(found)) > 25
