"""Each rule alone: the paper's example, the cases on either side of it, and what rests on it elsewhere."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion.plan import Chain, Dim, Elementwise, Input, MatMul, Softmax, attention, gemm_chain, mlp
from fusion.plan.device import load_device
from fusion.plan.expression import expressions, parse
from fusion.plan.placement import live_tiles
from fusion.plan.prune import (
    expression_classes,
    limit_entries,
    loaded_operands,
    online_reader,
    padding,
    padding_ratio,
    partial_tiles,
    repeated_finish,
    same_program,
    shared_estimate,
    shared_limit,
    split_softmax,
    tile_sizes,
)
from fusion.plan.schedule import schedule
from fusion.plan.traffic import skeleton
from tests.fusion.drawn_chains import chains, draw_tensors
from tests.fusion.interpretation import interpret

A100 = load_device("a100")
TWO = gemm_chain(M=1024, N=1024, K=512, H=512, dtype="fp16")
SCORES = attention(M=64, N=64, K=64)
DERIVED = Chain(  # dA = (exp(A B - l) * (G D)) B, the gradient of a softmax's operand as a chain
    tuple(Dim(letter, 64) for letter in "MNKHJ"),
    (Input("A", "MK"), Input("B", "NK"), Input("G", "MH"), Input("D", "NH"), Input("l", "M"), Input("B2", "NJ")),
    (
        MatMul("C", "A", "B", over="K"),
        Elementwise("C", "exp_minus", "l"),
        MatMul("dC", "G", "D", over="H"),
        Elementwise("dC", "mul", "C"),
        MatMul("dA", "dC", "B2", over="N"),
    ),
)


def turning(chain, text, loops=None):
    return skeleton(chain, parse(text), chain.loops if loops is None else loops)


def test_rule_1_leaves_the_papers_five_of_26():
    classes = expression_classes(TWO, expressions(TWO))
    assert [(str(group.representative), len(group.members)) for group in classes] == [
        ("mn(k,h)", 6), ("mnhk", 4), ("mknh", 4), ("mkhn", 8), ("mhnk", 4),
    ]  # fmt: skip
    assert same_program(parse("mn(k,h)"), classes) is None
    assert same_program(parse("nkhm"), classes) == "a block runs the same program as that of mn(k,h)"
    kept = [expression for expression in expressions(TWO) if same_program(expression, classes) is None]
    assert kept == [group.representative for group in classes]


def test_classes_do_not_depend_on_sizes():
    small = expression_classes(gemm_chain(M=1, N=16, K=3, H=5), expressions(TWO))
    assert [group.members for group in small] == [group.members for group in expression_classes(TWO, expressions(TWO))]


def test_rule_2_leaves_the_papers_three_of_five():
    reasons = {text: partial_tiles(TWO, turning(TWO, text)) for text in ("mn(k,h)", "mnhk", "mknh", "mkhn", "mhnk")}
    dropped = "all tiles of C along n would stay on chip at once"
    assert reasons == {"mn(k,h)": None, "mnhk": None, "mknh": dropped, "mkhn": dropped, "mhnk": None}


def test_rule_2_names_every_value_that_stays():
    chain = gemm_chain(M=64, N=64, K=64, H=64, P=64)
    assert partial_tiles(chain, turning(chain, "mknhp")) == (
        "all tiles of C along n and all tiles of E along h would stay on chip at once"
    )


def test_a_finish_in_a_loop_beside_its_sum_would_change_the_value_again():
    program = turning(DERIVED, "mn(jk,h)")
    assert "j k { L_A L_B C_C } h { L_G L_D C_dC } j { F_C }" in str(program)
    assert repeated_finish(DERIVED, program) == "F_C would run again in every round of j"
    assert repeated_finish(DERIVED, turning(DERIVED, "mn(jk,h)", "MNKH")) is None
    assert repeated_finish(DERIVED, turning(DERIVED, "mn(k,h,j)")) is None
    small = replace(DERIVED, dims=tuple(Dim(dim.name, 4) for dim in DERIVED.dims))
    tiles = dict.fromkeys("MNKHJ", 2)
    with pytest.raises(AssertionError, match="F_C runs twice"):
        interpret(small, schedule(small, "mn(jk,h)", tiles).program(small), tiles, draw_tensors(small))


@pytest.mark.parametrize("text", ["mn(k,h)", "mhnk", "mnhk"])
def test_a_softmax_may_be_split_where_one_product_sums_over_its_letter(text):
    assert split_softmax(SCORES, turning(SCORES, text)) is None


def test_k_outside_n_keeps_all_scores_until_their_softmax():
    """Right, but not for the chip: it is rule 2 that drops it."""
    program = turning(SCORES, "mkhn")
    assert str(program) == "[m h] { k { L_A n { L_B C_C } } n { F_C L_D C_E } S_E }"
    assert split_softmax(SCORES, program) is None
    assert partial_tiles(SCORES, program) == "all tiles of C along n would stay on chip at once"


def test_a_softmax_and_the_product_behind_it_must_share_the_loop():
    dims, inputs = (*SCORES.dims, Dim("P", 64)), (*SCORES.inputs, Input("F", "HP"))
    chain = Chain(dims, inputs, (*SCORES.stages, MatMul("G", "E", "F", over="H")))
    apart = turning(chain, "mkh(n,p)", "NH")
    assert str(apart) == "[m] { L_A n { L_B C_C F_C } h { n { L_D C_E } L_F C_G } S_G }"
    assert split_softmax(chain, apart) == "softmax of C over N: n must be a single tile"
    again = turning(chain, "mnhpk", "NP")
    assert "p { C_C F_C } L_D C_E" in str(again)
    assert split_softmax(chain, again) == "softmax of C over N would run again in every round of p"


@pytest.mark.parametrize(
    "stages",
    [
        (Softmax("C", over="M"),),
        (Softmax("C", over="N"), Elementwise("C", "add", 1.0)),
        (Softmax("C", over="N"), Elementwise("C", "relu")),
        (Softmax("C", over="N"), Softmax("C", over="N")),
    ],
    ids=str,
)
def test_other_softmaxes_need_a_single_tile(stages):
    chain = Chain(SCORES.dims, SCORES.inputs, (SCORES.stages[0], *stages, SCORES.stages[-1]))
    over = stages[0].over
    for expression in expressions(chain):
        assert split_softmax(chain, skeleton(chain, expression, chain.loops)) == (
            f"softmax of C over {over}: {over.lower()} must be a single tile"
        )
        assert split_softmax(chain, skeleton(chain, expression, chain.loops.replace(over, ""))) is None


def test_a_softmax_at_the_end_needs_a_single_tile():
    chain = Chain(TWO.dims, TWO.inputs, (*TWO.stages, Softmax("E", over="H")))
    assert split_softmax(chain, turning(chain, "mhnk")) == "softmax of E over H: h must be a single tile"
    assert split_softmax(chain, turning(chain, "mhnk", "MNK")) is None


def test_who_can_finish_a_softmax():
    scaled = Chain(SCORES.dims, SCORES.inputs, (*SCORES.stages[:3], Elementwise("C", "mul", 2.0), SCORES.stages[-1]))
    assert [online_reader(chain, chain.stages[2]) for chain in (SCORES, scaled)] == ["E", "E"]
    right = replace(SCORES, stages=(*SCORES.stages[:3], MatMul("E", "D", "C", over="N")))
    assert online_reader(right, right.stages[2]) == "E"


def test_a_value_with_two_readers_has_none_that_finishes_its_softmax():
    dims = tuple(Dim(letter, 8) for letter in "MNKHP")
    inputs = (Input("A", "MK"), Input("B", "NK"), Input("D", "NH"), Input("F", "MH"), Input("I", "NP"))
    stages = (
        MatMul("C", "A", "B", over="K"),
        Softmax("C", over="N"),
        MatMul("X", "F", "D", over="H"),
        Elementwise("X", "mul", "C"),
        MatMul("E", "X", "I", over="N"),
    )
    chain = Chain(dims, inputs, stages)
    assert online_reader(chain, stages[1]) is None


@settings(max_examples=60)
@given(chain=chains(), data=st.data())
def test_fewer_turning_loops_make_no_program_illegal(chain, data):
    """What the space relies on: an expression that is legal while all of its loops turn is so for all tiles."""
    expression = data.draw(st.sampled_from(expressions(chain)))
    more = "".join(letter for letter in chain.loops if data.draw(st.booleans()))
    fewer = "".join(letter for letter in more if data.draw(st.booleans()))
    before, after = skeleton(chain, expression, more), skeleton(chain, expression, fewer)
    for rule in (repeated_finish, split_softmax, partial_tiles):
        assert rule(chain, after) is None or rule(chain, before) is not None
    lived = live_tiles(before, chain)
    assert all(set(letters) <= set(lived[value]) for value, letters in live_tiles(after, chain).items())


def test_tile_sizes_are_multiples_of_16_up_to_the_first_that_holds_all():
    assert list(tile_sizes(64)) == [16, 32, 48, 64]
    assert list(tile_sizes(65)) == [16, 32, 48, 64, 80]
    assert [list(tile_sizes(size)) for size in (0, 1, 16)] == [[16]] * 3


def test_rule_3_leaves_the_papers_14_of_64_and_8_of_32():
    kept = {size: [tile for tile in tile_sizes(size) if padding(size, tile) is None] for size in (1024, 512)}
    assert [len(tiles) for tiles in kept.values()] == [14, 8]
    assert kept[512] == [16, 32, 48, 64, 128, 176, 256, 512]
    assert padding(512, 80) == "tiles of 80 add 9.4% to 512"


def test_rule_3_drops_from_5_percent_on():
    assert padding_ratio(320, 336) == 0.05
    assert padding(320, 336) == "tiles of 336 add 5.0% to 320"
    assert padding(336, 32) is None


@given(size=st.integers(0, 3000))
def test_rule_3_leaves_every_size_a_tile_that_holds_all(size):
    kept = [tile for tile in tile_sizes(size) if padding(size, tile) is None]
    assert kept[-1] == tile_sizes(size)[-1] >= size
    ratios = {tile: padding_ratio(max(size, 1), tile) for tile in tile_sizes(size)}
    assert kept == [tile for tile, ratio in ratios.items() if ratio < 0.05 or ratio == min(ratios.values())]


def test_rule_4_counts_the_inputs_of_products():
    assert loaded_operands(mlp(M=1, K=1, N=1, batch=2, gated=True, bias=True, residual=True)) == (
        ("M", "K"), ("N", "K"), ("N", "K"), ("H", "N"),
    )  # fmt: skip
    tiles = {"M": 128, "N": 256, "K": 64, "H": 112}
    entries = 128 * 64 + 64 * 256 + 256 * 112
    assert limit_entries(TWO, A100) == int(1.2 * 166912 / 2)
    assert shared_estimate(TWO, tiles, A100) is None
    assert shared_estimate(TWO, tiles | {"H": 512}, A100) == (
        f"tiles of {entries + 256 * 400} entries, above {limit_entries(TWO, A100)}"
    )


def test_rule_4_has_the_slack_of_the_paper_and_no_more():
    one = replace(A100, shared_bytes_per_block=(128 * 64 + 64 * 256 + 256 * 112) * 2 * 5 // 6)
    tiles = {"M": 128, "N": 256, "K": 64, "H": 112}
    assert shared_estimate(TWO, tiles, one) is not None  # rounded down above
    assert shared_estimate(TWO, tiles, replace(one, shared_bytes_per_block=one.shared_bytes_per_block + 1)) is None


def test_a_kernel_may_ask_for_all_that_a_block_has():
    made = schedule(TWO, "mhnk", dict.fromkeys("MNKH", 64))
    assert shared_limit(TWO, made, A100, lambda *_: 166912) is None
    assert shared_limit(TWO, made, A100, lambda *_: 166913) == "needs 166913 bytes of shared memory, above 166912"
    asked = []
    shared_limit(TWO, made, A100, lambda *arguments: asked.append(arguments) or 0)
    assert asked == [(TWO, made, A100)]
