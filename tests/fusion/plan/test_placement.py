"""Where statements stand: the paper's two examples, and any program run as it is written means what the chain means."""

import pytest
import torch
from closeness import assert_close
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fusion.plan import Chain, Dim, Elementwise, Input, MatMul, attention, gemm_chain
from fusion.plan.expression import expressions, parse
from fusion.plan.placement import grid_loops, live_tiles, num_shared, place
from fusion.plan.prune import repeated_finish, split_softmax
from fusion.reference import run
from tests.fusion.drawn_chains import DTYPES, chains, draw_tensors
from tests.fusion.interpretation import interpret

TWO = gemm_chain(M=8, N=8, K=8, H=8)
HALF = {"M": 4, "N": 4, "K": 4, "H": 4}


def placed(chain, text, tiles, **options):
    return str(place(chain, parse(text), tiles, **options))


def test_a_store_leaves_the_loops_that_do_not_index_it():
    """Figure 4(a)."""
    assert placed(TWO, "mhnk", HALF) == "m h { n { k { L_A L_B C_C } L_D C_E } S_E }"
    assert placed(TWO, "mhnk", HALF, hoist=False) == "m h n { k { L_A L_B C_C } L_D C_E S_E }"


def test_a_loop_of_one_round_is_none():
    """Figure 4(b): with all of K in a tile, A is loaded once for all of h and n."""
    assert placed(TWO, "mhnk", HALF | {"K": 8}) == "m { L_A h { n { L_B C_C L_D C_E } S_E } }"


def test_a_flat_expression_completes_a_tile_before_it_is_used():
    assert placed(TWO, "mn(k,h)", HALF) == "m { n { k { L_A L_B C_C } h { L_D C_E } } h { S_E } }"
    assert placed(TWO, "mnkh", HALF) == placed(TWO, "mn(k,h)", HALF)


def test_blocks_take_the_loops_outside_of_the_last_sum():
    assert [grid_loops(TWO, parse(text)) for text in ("mhnk", "nmhk", "mnhk", "khnm")] == ["MH", "M", "M", "MH"]
    assert placed(TWO, "mhnk", HALF, grid="MH") == "[m h] { n { k { L_A L_B C_C } L_D C_E } S_E }"
    assert placed(TWO, "mhnk", dict.fromkeys("MNKH", 8), grid="MH") == "[m h] { L_A L_B C_C L_D C_E S_E }"


def test_epilogues_finish_where_the_sum_is_complete():
    chain = attention(M=8, N=8, K=8, mask="MN")
    assert placed(chain, "mn(k,h)", HALF, grid="M") == (
        "[m] { n { k { L_A L_B C_C } L_mask F_C h { L_D C_E } } h { S_E } }"
    )


def test_live_tiles_of_the_five_classes():
    live = {}
    for text in ("mn(k,h)", "mnhk", "mknh", "mkhn", "mhnk"):
        program = place(TWO, parse(text), HALF, grid=grid_loops(TWO, parse(text)))
        live[text] = live_tiles(program, TWO)
    assert live == {
        "mn(k,h)": {"C": "", "E": "H"},
        "mnhk": {"C": "", "E": "H"},
        "mknh": {"C": "N", "E": "H"},
        "mkhn": {"C": "N", "E": ""},
        "mhnk": {"C": "", "E": ""},
    }


def test_tiles_that_another_loop_of_the_same_letter_reads_are_live():
    """G = (A B) D * (F I): the gate's sum stands between the loop over n that makes X and the one that reads it."""
    chain = Chain(
        tuple(Dim(letter, 8) for letter in "MNKHP"),
        (Input("A", "MK"), Input("B", "KN"), Input("F", "MP"), Input("I", "PH"), Input("D", "NH")),
        (
            MatMul("X", "A", "B", over="K"),
            MatMul("Y", "F", "I", over="P"),
            MatMul("G", "X", "D", over="N"),
            Elementwise("G", "mul", "Y"),
        ),
    )
    program = place(chain, parse("mh(nk,p)"), dict.fromkeys("MNKHP", 4), grid="MH")
    assert str(program) == "[m h] { n k { L_A L_B C_X } p { L_F L_I C_Y } n { L_D C_G } F_G S_G }"
    assert live_tiles(program, chain) == {"X": "N", "Y": "", "G": ""}


def test_nests_share_loops_from_the_outermost_on():
    assert [num_shared("mhn", other) for other in ("", "h", "mn", "mhnk", "mhn")] == [0, 0, 1, 3, 3]


@st.composite
def programs(draw, **options):
    """A chain, one of its expressions with tiles, and the program, where the rules on legality have nothing against."""
    chain = draw(chains(**options))
    expression = draw(st.sampled_from(expressions(chain)))
    tiles = {letter: draw(st.integers(1, min(chain.sizes[letter], 3))) for letter in chain.loops}
    grid = grid_loops(chain, expression) if draw(st.booleans()) else ""
    program = place(chain, expression, tiles, grid=grid, hoist=draw(st.booleans()))
    assume(repeated_finish(chain, program) is None and split_softmax(chain, program) is None)
    return chain, program, tiles


@settings(max_examples=120)
@given(drawn=programs())
def test_a_program_means_what_the_chain_means(drawn):
    """Exactly: run in float64 and rounded once, it is as near to the truth as fp32 can be."""
    chain, program, tiles = drawn
    tensors = draw_tensors(chain, dtype=torch.float64)
    output, _ = interpret(chain, program, tiles, tensors)
    truth = run(chain, tensors)
    assert_close(f"{chain}: {program}", output.float(), truth.float(), truth)


@settings(max_examples=50)
@given(drawn=programs(dtype="fp16"))
def test_a_program_in_a_low_precision_is_as_near_to_the_truth_as_the_plain_computation(drawn):
    chain, program, tiles = drawn
    tensors = draw_tensors(chain)
    output, _ = interpret(chain, program, tiles, tensors)
    truth = run(chain, draw_tensors(chain, dtype=torch.float64))
    assert_close(f"{chain}: {program}", output, run(chain, tensors), truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", ["mn(k,h)", "mhnk", "mnhk", "mknh", "mkhn"])
def test_odd_sizes_and_masked_rows_in_every_class(text, dtype):
    chain = attention(M=37, N=53, K=19, H=23, batch=2, keep="ZMN", causal=True, dtype=dtype)
    tiles = {"M": 16, "N": 16, "K": 16, "H": 16}
    if text in ("mknh", "mkhn"):  # k outside n: all of N must be there for the softmax
        tiles["N"] = 64
    program = place(chain, parse(text), tiles, grid=grid_loops(chain, parse(text)))
    assert split_softmax(chain, program) is None
    tensors, exact = draw_tensors(chain), draw_tensors(chain, dtype=torch.float64)
    for drawn in (tensors, exact):
        drawn["keep"][:, 5] = False  # a query without a key
    output, _ = interpret(chain, program, tiles, tensors)
    assert not output[:, 5].any()
    assert_close(text, output, run(chain, tensors), run(chain, exact))
