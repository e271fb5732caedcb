import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion import attention, gemm_chain
from fusion.emit.causal import bounds, vanishing
from fusion.emit.tiles import Tiles
from fusion.plan import Causal, Chain, Elementwise, Input, MatMul, Softmax

TL = types.SimpleNamespace(minimum=min, maximum=max)
sizes = st.integers(1, 60)
tile_sizes = st.sampled_from([5, 8, 16, 32])


def tiles(chain, **sizes):
    return Tiles(chain, chain.tensors, dict.fromkeys(chain.loops, 16) | sizes, dict.fromkeys("CE", ""), "")


def rounds(texts, tile, **variables):
    first, end = (eval(text, {"tl": TL}, variables) for text in texts)
    return list(range(first, end, tile))


@given(M=sizes, N=sizes, diagonal=st.integers(-70, 70), m_tile=tile_sizes, n_tile=tile_sizes, data=st.data())
def test_the_rounds_over_columns_are_those_with_an_entry(M, N, diagonal, m_tile, n_tile, data):
    chain = attention(M=M, N=N, K=4, causal=True, diagonal=diagonal)
    m = data.draw(st.sampled_from(range(0, M, m_tile)))
    last = m + m_tile - 1
    expected = [n for n in range(0, N, n_tile) if n <= last + diagonal]
    for at, variables in (({"M": "m"}, {"m": m}), ({"M": m}, {})):
        found = rounds(bounds(tiles(chain, M=m_tile, N=n_tile), ["E"], "N", "M", at), n_tile, **variables)
        assert found == expected


@given(M=sizes, N=sizes, diagonal=st.integers(-70, 70), m_tile=tile_sizes, n_tile=tile_sizes, data=st.data())
def test_the_rounds_over_rows_are_those_with_an_entry(M, N, diagonal, m_tile, n_tile, data):
    """For a product that sums over rows, as the gradient of the values does."""
    base = attention(M=M, N=N, K=4, causal=True, diagonal=diagonal)
    chain = Chain(base.dims, (*base.inputs[:2], Input("D", "MH")), (*base.stages[:-1], MatMul("E", "C", "D", over="M")))
    n = data.draw(st.sampled_from(range(0, N, n_tile)))
    found = rounds(bounds(tiles(chain, M=m_tile, N=n_tile), ["E"], "M", "N", {"N": "n"}), m_tile, n=n)
    assert found == [m for m in range(0, M, m_tile) if n <= m + m_tile - 1 + diagonal]


def test_all_rounds_are_kept_where_the_other_letter_turns_inside_or_another_sum_needs_them():
    chain = attention(M=40, N=40, K=4, causal=True)
    assert bounds(tiles(chain), ["E"], "N", "", {"M": 0}) == ("0", "40")
    assert bounds(tiles(chain), ["E", "C"], "N", "M", {"M": "m"}) == ("0", "40")
    assert bounds(tiles(chain), ["C"], "K", "MN", {"M": "m", "N": "n"}) == ("0", "4")


CAUSAL = Causal("C", "M", "N")


@pytest.mark.parametrize(
    ("stages", "found"),
    [
        ([CAUSAL, Softmax("C", "N")], True),
        ([CAUSAL, Softmax("C", "M")], True),
        ([CAUSAL, Elementwise("C", "exp_minus", "lse")], True),
        ([CAUSAL, Elementwise("C", "add", 1.0), Softmax("C", "N"), Elementwise("C", "mul", 2.0)], True),
        ([CAUSAL, Softmax("C", "N"), Elementwise("C", "gelu")], True),
        ([CAUSAL, Softmax("C", "N"), Elementwise("C", "add", 1.0)], False),
        ([CAUSAL, Softmax("C", "N"), Softmax("C", "N")], False),
        ([CAUSAL, Softmax("C", "N"), Elementwise("C", "exp_minus", "lse")], False),
        ([Softmax("C", "N")], False),
        ([Softmax("C", "N"), CAUSAL, Softmax("C", "N")], True),
    ],
    ids=str,
)
def test_masked_entries_vanish_where_nothing_fills_them_again(stages, found):
    plain = gemm_chain(M=3, N=4, K=5, H=6)
    first, second = plain.products
    reads = any(getattr(stage, "operand", None) == "lse" for stage in stages)
    inputs = (*plain.inputs, *((Input("lse", "M"),) if reads else ()))
    chain = Chain(plain.dims, inputs, (first, *stages, second))
    assert vanishing(chain, "C") == (CAUSAL if found else None)
