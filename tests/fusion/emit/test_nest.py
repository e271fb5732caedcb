import pytest

from fusion import attention, gemm_chain
from fusion.emit.nest import Nest
from fusion.emit.softmax import online_softmaxes
from fusion.emit.statements import StatementText
from fusion.emit.tiles import Tiles
from fusion.plan.placement import live_tiles, statements_in
from fusion.plan.schedule import schedule
from fusion.plan.statements import dependence_graph


def skeleton(chain, expression, lse="", **tiles):
    """A kernel's lines without what the statements hold: loops, starts of sums, and what follows them."""
    plan = schedule(chain, expression, dict.fromkeys(chain.loops, 16) | tiles)
    program = plan.program(chain)
    at = dict.fromkeys(chain.loops, 0) | {letter: letter.lower() for letter, extent in program.grid if extent > 1}
    letters = chain.tensors | {"lse": "M"}
    layout = Tiles(chain, letters, dict(plan.tiles), live_tiles(program, chain), "".join(dict(program.grid)))
    text = StatementText(layout, online_softmaxes(chain, program), frozenset(), lse, exact=False, upcast=False)
    return list(Nest(layout, program, text).body(program.body, at)), program


def starts(lines):
    return [line.strip().split(" = ")[0] for line in lines if "tl.full(" in line]


def test_sums_start_before_their_loop_and_again_in_every_round_around_it():
    lines, _ = skeleton(gemm_chain(M=32, N=32, K=32, H=32), "mhnk")
    assert [line for line in lines if "tl.full" in line or "for " in line] == [
        "acc_E_MH = tl.full((16, 16), 0.0, tl.float32)",
        "for n in range(0, 32, 16):",
        "    acc_C_MN = tl.full((16, 16), 0.0, tl.float32)",
        "    for k in range(0, 32, 16):",
    ]
    assert lines[-1].startswith("tl.store(")


def test_a_loop_over_live_tiles_is_written_out():
    lines, _ = skeleton(gemm_chain(M=32, N=32, K=32, H=48), "mn(k,h)")
    assert starts(lines) == ["acc_E_MH_0", "acc_E_MH_1", "acc_E_MH_2", "acc_C_MN"]
    assert not any("for h" in line for line in lines)
    assert sum("tl.store(" in line for line in lines) == 3
    assert [line.strip() for line in lines if "tile 2 of 3" in line] == ["# H, tile 2 of 3"] * 2


def test_a_loop_of_one_round_is_none():
    lines, _ = skeleton(gemm_chain(M=16, N=16, K=16, H=16), "mhnk")
    assert not any("for " in line or "tl.full" in line for line in lines)


@pytest.mark.parametrize(("expression", "expected"), [("mhnk", ["C_M"]), ("mnhk", ["C_M_0", "C_M_1"])])
def test_rows_keep_a_maximum_and_a_sum_for_every_tile_inside_the_loop(expression, expected):
    """In `mnhk` h turns inside, so C and its softmax are made again for both of its tiles."""
    chain = attention(M=32, N=32, K=16, H=32)
    lines, _ = skeleton(chain, expression, lse="lse")
    rows = [line for line in starts(lines) if line.startswith(("max_", "sum_"))]
    assert rows == [f"{kind}_{name}" for name in expected for kind in ("max", "sum")]
    after = [line for line in lines if not line.startswith((" ", "#"))][-2 * len(expected) - 1 :]
    assert sum(line.startswith("tl.store(lse_base") for line in after) == len(expected)


def test_causal_rounds_are_bounded_only_by_a_tile_that_is_known():
    causal = attention(M=64, N=64, K=16, causal=True)
    lines, _ = skeleton(causal, "mhnk")
    assert "for n in range(0, tl.minimum(64, m + 16), 16):" in lines
    lines, _ = skeleton(attention(M=64, N=64, K=16), "mhnk")
    assert "for n in range(0, 64, 16):" in lines


def test_every_statement_is_found():
    chain = gemm_chain(M=32, N=32, K=32, H=32, P=32, activation="relu")
    _, program = skeleton(chain, "mn(k,hp)")
    graph = {node.statement for node in dependence_graph(chain)}
    assert set(statements_in(program.body)) == graph
