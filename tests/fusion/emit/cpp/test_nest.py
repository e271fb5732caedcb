from fusion import attention, gemm_chain
from fusion.emit.cpp.kernel import emit
from fusion.plan.schedule import schedule


def test_loops_that_turn_are_loops_and_others_are_one_tile():
    chain = gemm_chain(M=64, N=64, K=64, H=64)
    source = emit(chain, schedule(chain, "mn(k,h)", {"M": 16, "N": 32, "K": 16, "H": 64})).source
    assert "for (int64_t N_at = 0; N_at < N_size; N_at += N_tile) {" in source
    assert "for (int64_t K_at = 0; K_at < K_size; K_at += K_tile) {" in source
    assert "[[maybe_unused]] const int64_t H_at = 0, H_len = H_size;" in source
    assert source.index("zero(E_tile") < source.index("for (int64_t N_at") < source.index("zero(C_tile")


def test_rounds_that_a_causal_mask_leaves_nothing_of_are_not_run():
    chain = attention(M=64, N=64, K=64, H=64, causal=True)
    source = emit(chain, schedule(chain, "mn(k,h)", {"M": 16, "N": 32, "K": 64, "H": 64})).source
    assert "N_at < std::min(N_size, M_at + M_len + (0)); N_at += N_tile" in source
