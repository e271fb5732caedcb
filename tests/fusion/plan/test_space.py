"""The funnel of the paper's example, and that counts and candidates are what the rules say one by one."""

from dataclasses import replace
from itertools import product as combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion.plan import Chain, Softmax, attention, gemm_chain
from fusion.plan.device import load_device
from fusion.plan.expression import expressions
from fusion.plan.prune import (
    expression_classes,
    padding,
    partial_tiles,
    repeated_finish,
    same_program,
    shared_estimate,
    split_softmax,
    tile_sizes,
)
from fusion.plan.schedule import Schedule
from fusion.plan.space import SpaceError, search_space
from tests.fusion.drawn_chains import chains

A100 = load_device("a100")
PAPER = gemm_chain(M=1024, N=1024, K=512, H=512, dtype="fp16")


def counts(space):
    return [(step.rule, step.expressions, step.candidates) for step in space.funnel]


def test_the_funnel_of_the_papers_example():
    space = search_space(PAPER, A100)
    assert counts(space) == [
        ("all", 26, 109_051_904),
        ("rule 1, same program", 5, 20_971_520),
        ("rule 2, partial tiles", 3, 12_582_912),
        ("legality", 3, 12_582_912),
        ("rule 3, padding", 3, 37_632),
        ("rule 4, shared memory", 3, 24_144),
    ]
    assert space.candidates == 24_144
    assert [str(region.expression) for region in space.regions] == ["mn(k,h)", "mnhk", "mhnk"]


def test_the_funnel_says_what_dropped_how_many():
    space = search_space(PAPER, A100)
    for before, step in zip(space.funnel, space.funnel[1:], strict=False):
        assert sum(number for _, number in step.dropped) == before.candidates - step.candidates
    assert space.funnel[2].dropped == (("all tiles of C along n would stay on chip at once", 8_388_608),)
    assert str(space.funnel[5]) == (
        "rule 4, shared memory: 24,144 candidates, 3 expressions\n    13,488: tiles of more than 100147 entries"
    )


def test_chimeras_space_has_nested_orders_alone():
    space = search_space(PAPER, A100, kind="chimera")
    assert counts(space)[1:4] == [
        ("rule 1, same program", 5, 20_971_520),
        ("nested orders only", 4, 16_777_216),
        ("rule 2, partial tiles", 2, 8_388_608),
    ]
    assert [str(region.expression) for region in space.regions] == ["mnhk", "mhnk"]
    assert space.candidates == 16_096
    assert space.funnel[2].dropped == (("a flat expression runs it too", 4_194_304),)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"kind='ansor' must be one of \('mcfuser', 'chimera'\)"):
        search_space(PAPER, A100, kind="ansor")


def test_a_softmax_that_cannot_be_split_ties_its_tile():
    chain = attention(M=64, N=64, K=64, dtype="fp16")
    chain = Chain(chain.dims, chain.inputs, (*chain.stages, Softmax("E", over="H")), chain.dtype)
    space = search_space(chain, A100)
    assert space.funnel[3].dropped == (("softmax of E over H: h must be a single tile", 3 * 4**3 * 3),)
    assert all(dict(region.choices)["H"] == (64,) for region in space.regions)
    assert space.candidates == 3 * 3 * 3 * 3


def test_a_device_without_room_leaves_nothing_and_says_why():
    tiny = replace(A100, name="tiny", shared_bytes_per_block=1024)
    why = r"no candidate is left for C\[M,N\] = .* on tiny:\nall: 109,051,904 .*\n(.*\n)*"
    why += "rule 4, shared memory: 0 candidates, 0 expressions\n    37,632: tiles of"
    with pytest.raises(SpaceError, match=why):
        search_space(PAPER, tiny)


def by_the_rules(chain, device):
    """Every candidate that each rule alone accepts, found the slow way."""
    every = expressions(chain)
    classes = expression_classes(chain, every)
    kept = [
        group.representative
        for group in classes
        if same_program(group.representative, classes) is None and partial_tiles(chain, group.program) is None
    ]
    sizes = [[t for t in tile_sizes(chain.sizes[x]) if padding(chain.sizes[x], t) is None] for x in chain.loops]
    for expression in kept:
        for choice in combinations(*sizes):
            made = Schedule(expression, tuple(zip(chain.loops, choice, strict=True)))
            program = made.program(chain)
            legal = repeated_finish(chain, program) is None and split_softmax(chain, program) is None
            if legal and shared_estimate(chain, dict(made.tiles), device) is None:
                yield made


@settings(max_examples=12)
@given(chain=chains(max_size=40), shared=st.sampled_from([4096, 8192, 166912]))
def test_the_space_is_what_the_rules_leave_one_by_one(chain, shared):
    device = replace(A100, shared_bytes_per_block=shared)
    expected = list(by_the_rules(chain, device))
    if not expected:
        with pytest.raises(SpaceError):
            search_space(chain, device)
        return
    space = search_space(chain, device)
    found = [
        Schedule(region.expression, tuple(zip([x for x, _ in region.choices], tiles, strict=True)))
        for region in space.regions
        for tiles in space.tiles(region)
    ]
    assert len(set(found)) == len(found) == space.candidates
    assert set(found) == set(expected)


@settings(max_examples=20)
@given(chain=chains(max_size=90), data=st.data())
def test_the_sizes_of_one_loop_are_those_that_rule_4_accepts_beside_the_others(chain, data):
    space = search_space(chain, A100)
    region = data.draw(st.sampled_from(space.regions))
    tiles = [data.draw(st.sampled_from(sizes)) for _, sizes in region.choices]
    index = data.draw(st.integers(0, len(tiles) - 1))
    letters = [letter for letter, _ in region.choices]

    def accepted(size):
        named = dict(zip(letters, [*tiles[:index], size, *tiles[index + 1 :]], strict=True))
        return shared_estimate(chain, named, A100) is None

    assert space.sizes(region, tiles, index) == tuple(filter(accepted, region.choices[index][1]))


def test_every_size_has_a_candidate():
    for size in (0, 1, 17, 50, 333):
        assert search_space(attention(M=size, N=size, K=size), A100).candidates > 0
