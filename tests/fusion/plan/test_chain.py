import copy
import pickle
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion.plan import Causal, Chain, Dim, Elementwise, Input, MatMul, Softmax, attention, gemm_chain, mlp

sizes = st.integers(0, 5000)
optional = st.none() | st.integers(0, 9)
dtypes = st.sampled_from(["fp32", "fp16", "bf16"])
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


@given(M=sizes, N=sizes, K=sizes, H=sizes, batch=optional, dtype=dtypes)
def test_flops_and_bytes_of_two_products(M, N, K, H, batch, dtype):
    chain = gemm_chain(M=M, N=N, K=K, H=H, batch=batch, dtype=dtype)
    Z, item_bytes = 1 if batch is None else batch, BYTES[dtype]
    assert chain.flops == 2 * Z * M * N * (K + H)
    assert chain.io_bytes == item_bytes * Z * (M * K + K * N + N * H + M * H)
    assert chain.intermediate_bytes == item_bytes * 2 * Z * M * N


@given(M=sizes, N=sizes, K=sizes, H=sizes, P=sizes)
def test_three_products_add_up_to_their_parts(M, N, K, H, P):
    whole = gemm_chain(M=M, N=N, K=K, H=H, P=P)
    parts = [gemm_chain(M=M, N=N, K=K), gemm_chain(M=M, N=H, K=N), gemm_chain(M=M, N=P, K=H)]
    assert whole.flops == sum(part.flops for part in parts)
    assert whole.io_bytes + whole.intermediate_bytes == sum(part.io_bytes for part in parts)
    assert all(part.intermediate_bytes == 0 for part in parts)


@given(Z=sizes, kv_heads=st.integers(1, 4), repeats=st.integers(1, 4), M=sizes, N=sizes, K=sizes, H=sizes, dtype=dtypes)
def test_flops_and_bytes_of_grouped_attention(Z, kv_heads, repeats, M, N, K, H, dtype):
    heads, item_bytes = kv_heads * repeats, BYTES[dtype]
    chain = attention(M=M, N=N, K=K, H=H, batch=Z, heads=heads, kv_heads=kv_heads, mask="MN", keep="ZN", dtype=dtype)
    assert chain.flops == 2 * Z * heads * M * N * (K + H)
    read_once = Z * heads * M * (K + H) + Z * kv_heads * N * (K + H) + M * N
    assert chain.io_bytes == item_bytes * read_once + Z * N  # the boolean mask has one byte an entry
    assert chain.intermediate_bytes == item_bytes * 2 * Z * heads * M * N


@given(M=sizes, K=sizes, N=sizes, H=sizes, batch=optional)
def test_flops_and_bytes_of_a_gated_mlp(M, K, N, H, batch):
    chain = mlp(M=M, K=K, N=N, H=H, batch=batch, gated=True, bias=True, residual=True, dtype="bf16")
    Z = 1 if batch is None else batch
    assert chain.flops == 2 * Z * M * N * (2 * K + H)
    assert chain.io_bytes == 2 * Z * (M * K + 2 * K * N + 2 * N + N * H + H + 2 * M * H)
    assert chain.intermediate_bytes == 2 * 2 * Z * (2 * M * N)


def test_what_a_search_asks_of_attention():
    chain = attention(M=5, N=7, K=3, H=4, batch=2, heads=6, kv_heads=2, keep="ZN")
    assert (chain.batch, chain.loops, chain.output, chain.intermediates) == ("ZGR", "MNKH", "E", ("C",))
    assert list(chain.sizes.items()) == [("Z", 2), ("G", 2), ("R", 3), ("M", 5), ("N", 7), ("K", 3), ("H", 4)]
    assert chain.tensors == {"A": "ZGRMK", "B": "ZGNK", "D": "ZGNH", "keep": "ZN", "C": "ZGRMN", "E": "ZGRMH"}
    assert chain.shape("C") == (2, 2, 3, 5, 7)
    assert chain.boolean_inputs == {"keep"}
    assert [(product.out, product.over) for product in chain.products] == [("C", "K"), ("E", "N")]
    assert (chain.softmax_over("C"), chain.softmax_over("E")) == ("N", "")
    assert [type(stage) for stage in chain.epilogue("C")] == [Elementwise, Elementwise, Softmax]
    assert chain.epilogue("E") == ()


@pytest.mark.parametrize(
    ("stages", "linear"),
    [
        ((), True),
        ((Elementwise("C", "mul", 0.5),), True),
        ((Elementwise("C", "mul", 0.5), Elementwise("C", "relu")), False),
        ((Elementwise("C", "add", 0.5),), False),
        ((Elementwise("C", "mul", "gate"),), False),
        ((Softmax("C", over="N"),), False),
    ],
)
def test_only_scales_let_partial_sums_through(stages, linear):
    plain = gemm_chain(M=2, N=3, K=4, H=5)
    gate = (Input("gate", "MN"),) if Elementwise("C", "mul", "gate") in stages else ()
    chain = Chain(plain.dims, plain.inputs + gate, (plain.stages[0], *stages, plain.stages[1]))
    assert chain.is_linear("C") is linear
    assert chain.is_linear("E")


@pytest.mark.parametrize(
    ("chain", "text"),
    [
        (
            gemm_chain(M=8, N=4, K=2, H=3, P=1, batch=6, activation="relu"),
            (
                "C[Z,M,N] = A[Z,M,K] B[Z,K,N]; C = relu(C); E[Z,M,H] = C[Z,M,N] D[Z,N,H]; E = relu(E); "
                "G[Z,M,P] = E[Z,M,H] F[Z,H,P] | Z=6 (batch) M=8 N=4 K=2 H=3 P=1 | fp32"
            ),
        ),
        (
            attention(M=8, N=9, K=4, mask="MN", keep="N", causal=True, diagonal=1, dtype="fp16"),
            (
                "C[M,N] = A[M,K] B[N,K]; C *= 0.5; C += mask[M,N]; C = mask(C, keep[N]); C = causal(C, N <= M + 1); "
                "C = softmax(C, N); E[M,H] = C[M,N] D[N,H] | M=8 N=9 K=4 H=4 | fp16"
            ),
        ),
        (
            mlp(M=8, K=2, N=4, gated=True, bias=True, residual=True, activation="silu"),
            (
                "C_up[M,N] = A[M,K] B_up[N,K]; C_up += bias_C_up[N]; C[M,N] = A[M,K] B[N,K]; C += bias_C[N]; "
                "C = silu(C); C *= C_up[M,N]; E[M,H] = C[M,N] D[H,N]; E += bias_E[H]; E += residual[M,H] "
                "| M=8 N=4 K=2 H=2 | fp32"
            ),
        ),
    ],
)
def test_golden_texts(chain, text):
    assert str(chain) == text


def test_a_negative_diagonal_is_written_with_its_sign():
    assert "N <= M - 2)" in str(attention(M=8, N=6, K=4, causal=True, diagonal=-2))


attentions = st.builds(
    attention,
    M=st.integers(1, 2),
    N=st.integers(1, 2),
    K=st.integers(1, 2),
    H=st.none() | st.integers(1, 2),
    batch=st.none() | st.just(2),
    heads=st.just(4),
    kv_heads=st.none() | st.sampled_from([1, 2, 4]),
    scale=st.none() | st.sampled_from([0.5, 1.0]),
    mask=st.none() | st.sampled_from(["MN", "NM", "N"]),
    keep=st.none() | st.sampled_from(["MN", "NM", "N"]),
    causal=st.just(True),
    diagonal=st.integers(-1, 1),
    dtype=dtypes,
)


@given(one=attentions, other=attentions)
def test_chains_are_values_that_their_texts_tell_apart(one, other):
    assert (one == other) == (str(one) == str(other))
    assert hash(one) == hash(copy.deepcopy(one))
    assert pickle.loads(pickle.dumps(one)) == one
    assert b"_hash" not in pickle.dumps(one)  # which another process would find to be another


def test_a_chain_is_frozen():
    with pytest.raises(AttributeError):
        gemm_chain(M=2, N=2, K=2).dtype = "fp16"


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match=r"dtype='fp8' must be one of \('fp32', 'fp16', 'bf16'\)"):
        gemm_chain(M=2, N=2, K=2, dtype="fp8")


def test_the_order_of_dims_orders_values():
    dims = (Dim("N", 3), Dim("M", 2), Dim("K", 4))
    chain = Chain(dims, (Input("A", "MK"), Input("B", "KN")), (MatMul("C", "A", "B", over="K"),))
    assert (chain.tensors["C"], chain.shape("C")) == ("NM", (3, 2))


def test_plans_import_no_torch():
    command = "import sys, fusion.plan; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", command], check=True)


def test_causal_keeps_its_place_among_the_stages():
    stages = attention(M=2, N=2, K=2, causal=True).stages
    assert stages[2:4] == (Causal("C", row="M", column="N"), Softmax("C", over="N"))
