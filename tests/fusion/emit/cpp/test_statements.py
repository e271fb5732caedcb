from dataclasses import replace

from fusion import attention
from fusion.emit.cpp.kernel import emit
from fusion.plan.schedule import schedule

TILES = {"M": 16, "N": 32, "K": 64, "H": 64}


def test_an_online_softmax_keeps_its_rows_and_corrects_the_sums_before_they_grow():
    chain = attention(M=64, N=64, K=64, H=64)
    source = emit(chain, schedule(chain, "mn(k,h)", TILES)).source
    order = [source.index(text) for text in ("start(C_peak", "product<6, 4>(Full(), A", "totals = totals + x",
                                             "multiply_rows(E_tile", "product<6, 4>(Full(), C_tile",
                                             "divide_rows(E_tile", "store_tile(E_tile")]  # fmt: skip
    assert order == sorted(order)


def test_a_softmax_that_one_tile_holds_is_divided_by_its_reader_or_in_place():
    chain = attention(M=64, N=64, K=64, H=64)
    source = emit(chain, schedule(chain, "mn(k,h)", TILES | {"N": 64})).source
    assert source.index("product<6, 4>(Full(), C_tile") < source.index("divide_rows(E_tile, 80, M_len, H_len, C_total")
    assert "multiply_rows" not in source
    alone = replace(chain, dims=chain.dims[:3], inputs=chain.inputs[:2], stages=chain.stages[:3])
    source = emit(alone, schedule(alone, "mnk", {"M": 16, "N": 64, "K": 64})).source
    assert "divide_rows(C_tile" in source


def test_a_causal_mask_cuts_rows_products_and_sums():
    chain = attention(M=64, N=64, K=64, H=64, causal=True)
    source = emit(chain, schedule(chain, "mn(k,h)", TILES)).source
    assert "product<6, 4>(ColumnsBefore(M_at - N_at + 1), A" in source
    assert "product<6, 4>(DepthBefore(M_at - N_at + 1), C_tile" in source
    assert "const int64_t kept = std::clamp<int64_t>(r + M_at - N_at + 1, 0, N_len);" in source
