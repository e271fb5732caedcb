"""Bytes and flops of programs: the paper's examples, what the interpretation counts, and unfused chains by hand."""

import math
from collections import Counter

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fusion.plan import attention, gemm_chain, mlp
from fusion.plan.expression import expressions, parse
from fusion.plan.placement import grid_loops, place
from fusion.plan.prune import repeated_finish, split_softmax
from fusion.plan.schedule import schedule
from fusion.plan.traffic import compute_letters, naive_program, repeats, skeleton, traffic, unfused_bytes
from tests.fusion.drawn_chains import chains, draw_tensors
from tests.fusion.interpretation import interpret

TWO = gemm_chain(M=64, N=48, K=32, H=80, dtype="fp16")
TILES = {"M": 16, "N": 16, "K": 16, "H": 16}  # 4, 3, 2 and 5 rounds


def moved(chain, program, tiles):
    return {str(found.statement): found.bytes for found in traffic(chain, program, tiles).moved}


def test_the_stores_of_figure_4a_fall_by_the_rounds_of_n():
    made = schedule(TWO, "mhnk", TILES)
    assert moved(TWO, naive_program(TWO, made), TILES)["S_E"] == 3 * TWO.num_bytes("E")
    assert moved(TWO, made.program(TWO), TILES) == {
        "L_A": 5 * 3 * TWO.num_bytes("A"),
        "L_B": 4 * 5 * TWO.num_bytes("B"),
        "L_D": 4 * TWO.num_bytes("D"),
        "S_E": TWO.num_bytes("E"),
    }


def test_the_loads_of_figure_4b_fall_by_the_rounds_of_h_and_n():
    whole_K = TILES | {"K": 32}
    program = place(TWO, parse("mhnk"), whole_K)
    assert moved(TWO, program, whole_K)["L_A"] == TWO.num_bytes("A")
    assert moved(TWO, place(TWO, parse("mhnk"), whole_K, hoist=False), whole_K)["L_A"] == 5 * 3 * TWO.num_bytes("A")


def test_trips_and_flops_by_hand():
    found = traffic(TWO, schedule(TWO, "mhnk", TILES).program(TWO), TILES)
    assert [(str(x.statement), x.trips) for x in found.moved] == [
        ("L_A", 4 * 5 * 3 * 2), ("L_B", 4 * 5 * 3 * 2), ("L_D", 4 * 5 * 3), ("S_E", 4 * 5),
    ]  # fmt: skip
    C, E = found.computed
    assert (C.trips, C.flops, C.padded_flops) == (4 * 5 * 3 * 2, 5 * 2 * 64 * 48 * 32, 5 * 2 * 64 * 48 * 32)
    assert (E.trips, E.flops) == (4 * 5 * 3, 2 * 64 * 48 * 80)
    assert found.flops == found.padded_flops == C.flops + E.flops
    assert found.bytes == sum(moved(TWO, schedule(TWO, "mhnk", TILES).program(TWO), TILES).values())


def test_edges_are_cut_in_bytes_and_whole_in_padded_flops():
    chain, tiles = gemm_chain(M=17, N=16, K=5), {"M": 16, "N": 16, "K": 16}
    found = traffic(chain, schedule(chain, "mnk", tiles).program(chain), tiles)
    assert found.bytes == 4 * (17 * 5 + 2 * 5 * 16 + 17 * 16)
    assert (found.flops, found.padded_flops) == (2 * 17 * 16 * 5, 2 * 32 * 16 * 16)


def test_batches_read_again_what_lacks_their_letters():
    chain = attention(M=32, N=32, K=16, batch=3, heads=4, kv_heads=2, mask="MN", keep="ZN", dtype="bf16")
    tiles = {"M": 16, "N": 16, "K": 16, "H": 16}
    found = moved(chain, schedule(chain, "mn(k,h)", tiles).program(chain), tiles)
    assert found == {
        "L_A": chain.num_bytes("A"),
        "L_B": 2 * 2 * chain.num_bytes("B"),  # again for the query heads that share it, and for every block of rows
        "L_mask": 3 * 4 * chain.num_bytes("mask"),
        "L_keep": 4 * 2 * chain.num_bytes("keep"),
        "L_D": 2 * 2 * chain.num_bytes("D"),
        "S_E": chain.num_bytes("E"),
    }


@settings(max_examples=80)
@given(chain=chains(), data=st.data())
def test_the_interpretation_counts_the_same(chain, data):
    expression = data.draw(st.sampled_from(expressions(chain)))
    tiles = {letter: data.draw(st.integers(1, min(chain.sizes[letter], 3))) for letter in chain.loops}
    program = place(chain, expression, tiles, grid=grid_loops(chain, expression), hoist=data.draw(st.booleans()))
    assume(repeated_finish(chain, program) is None and split_softmax(chain, program) is None)
    _, counts = interpret(chain, program, tiles, draw_tensors(chain, dtype=torch.float32))
    found = traffic(chain, program, tiles)
    for name, statements in (("bytes", found.moved), ("flops", found.computed), ("padded_flops", found.computed)):
        total = Counter()
        for statement in statements:
            total[statement.statement] += getattr(statement, name)
        assert total == getattr(counts, name), name
    trips = Counter()
    for statement in found.moved + found.computed:
        trips[statement.statement] += statement.trips
    assert trips == {statement: number for statement, number in counts.trips.items() if statement.kind != "F"}
    assert found.bytes == sum(counts.bytes.values())
    assert found.flops >= chain.flops


@settings(max_examples=60)
@given(chain=chains(), data=st.data())
def test_placement_moves_no_more_than_the_naive_one(chain, data):
    expression = data.draw(st.sampled_from(expressions(chain)))
    tiles = {letter: data.draw(st.integers(1, chain.sizes[letter])) for letter in chain.loops}
    made = schedule(chain, str(expression), tiles)
    hoisted, naive = (traffic(chain, p, tiles) for p in (made.program(chain), naive_program(chain, made)))
    assert hoisted.bytes <= naive.bytes
    assert hoisted.bytes >= chain.io_bytes


@settings(max_examples=60)
@given(chain=chains(), data=st.data())
def test_what_repeats_depends_on_the_loops_that_turn_alone(chain, data):
    expression = data.draw(st.sampled_from(expressions(chain)))
    tiles = {letter: data.draw(st.integers(1, chain.sizes[letter])) for letter in chain.loops}
    turning = "".join(letter for letter in chain.loops if tiles[letter] < chain.sizes[letter])
    program = place(chain, expression, tiles, grid=grid_loops(chain, expression))
    same = skeleton(chain, expression, turning)
    assert repeats(chain, same) == repeats(chain, program)
    assert all(loop.extent == 2 for _, loops in same.walk() for loop in loops)


def test_letters_of_a_product_have_the_sum_last():
    assert compute_letters(attention(M=1, N=1, K=1, batch=1), "C") == "ZMNK"


def test_unfused_chains_by_hand():
    M, N, K, H, P = 7, 5, 3, 2, 4
    assert unfused_bytes(gemm_chain(M=M, N=N, K=K, H=H, P=P, activation="gelu")) == 4 * (
        M * K + K * N + 2 * M * N + N * H + 2 * M * H + H * P + M * P
    )


def test_a_softmax_is_a_kernel_of_its_own_which_takes_what_follows():
    M, N, K = 7, 5, 3
    chain = attention(M=M, N=N, K=K, batch=2, mask="MN", keep="N")
    assert unfused_bytes(chain) == 4 * 2 * (2 * M * K + 2 * N * K + 4 * M * N) + 4 * M * N + N


def test_a_gate_is_read_once_by_the_product_behind_it():
    M, N, K = 7, 5, 3
    assert unfused_bytes(mlp(M=M, N=N, K=K, gated=True, bias=True, dtype="bf16")) == 2 * (
        (M * K + K * N + N + M * N) + (M * K + K * N + N + 2 * M * N) + (M * N + N * K + K + M * K)
    )


@settings(max_examples=100)
@given(chain=chains())
def test_with_whole_tensors_as_tiles_nothing_moves_twice(chain):
    assert unfused_bytes(chain) >= chain.io_bytes + chain.intermediate_bytes
    whole = {letter: chain.sizes[letter] for letter in chain.loops}
    for expression in expressions(chain)[::7]:
        program = place(chain, expression, whole, grid=grid_loops(chain, expression))
        read = sum(
            chain.num_bytes(tensor.name) * math.prod(chain.sizes[x] for x in chain.batch if x not in tensor.dims)
            for tensor in chain.inputs
        )
        assert traffic(chain, program, whole).bytes == read + chain.num_bytes(chain.output)
