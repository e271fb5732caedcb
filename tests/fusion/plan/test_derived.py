import string

import pytest

from fusion.plan import Chain, Dim, Elementwise, Input, MatMul, attention, gemm_chain, mlp
from fusion.plan.derived import GradientError, Source, derive

STORED = frozenset("E")


def test_a_gradient_past_an_activation():
    chain = gemm_chain(M=2, N=3, K=4, H=5, activation="relu")
    step = derive(chain, STORED, 0, "A")
    assert str(step) == (
        "dA += C[M,N] = A[M,K] B[K,N]; dC[M,N] = dE[M,H] D[N,H]; dC = relu_grad(dC, C[M,N]); "
        "dA[M,L] = dC[M,N] B_2[L,N] | M=2 L=4 N=3 K=4 H=5 | fp32 where dE = gradient(E), B_2 = B"
    )
    assert dict(step.sources) == {
        "dE": Source("gradient", "E"),
        "D": Source("input", "D"),
        "A": Source("input", "A"),
        "B": Source("input", "B"),
        "B_2": Source("input", "B"),
    }


def test_nothing_is_computed_again_where_nothing_depends_on_it():
    step = derive(gemm_chain(M=2, N=3, K=4, H=5), STORED, 0, "B")
    assert str(step) == (
        "dB += dC[N,M] = dE[M,H] D[N,H]; dB[K,N] = A[M,K] dC[N,M] | K=4 N=3 M=2 H=5 | fp32 where dE = gradient(E)"
    )


@pytest.mark.parametrize(
    ("dtype", "softmax", "delta"),
    [
        ("fp32", "C = exp_minus(C, lse[G,R,M])", "dC += neg_delta[G,R,M]"),
        (
            "bf16",
            "C += neg_lse[G,R,M]; C = exp_minus(C, lse_rest[G,R,M])",
            "dC += neg_delta[G,R,M]; dC += neg_delta_rest[G,R,M]",
        ),
    ],
)
def test_a_gradient_past_a_softmax(dtype, softmax, delta):
    chain = attention(M=2, N=3, K=4, H=5, heads=2, kv_heads=1, causal=True, dtype=dtype)
    step = derive(chain, STORED, 0, "B")
    assert str(step).startswith(
        "dB += sum over R of C[R,G,N,M] = A[G,R,M,K] B[G,N,K]; C *= 0.5; C = causal(C, N <= M); "
        f"{softmax}; dC[R,G,N,M] = dE[G,R,M,H] D[G,N,H]; {delta}; dC *= C[R,G,N,M]; dC *= 0.5; "
        "dB[R,G,N,L] = A_2[G,R,M,L] dC[R,G,N,M] | "
    )
    assert step.summed == "R"


def test_a_gate_and_what_it_multiplies():
    chain = mlp(M=2, N=3, K=4, H=5, gated=True, activation="silu")
    up = derive(chain, STORED, 0, "A").chain
    own = derive(chain, STORED, 1, "A").chain
    assert [product.out for product in up.products] == ["C", "dC", "dA"]
    assert "C = silu(C); dC[M,N] = dE[M,H] D[H,N]; dC *= C[M,N]; " in str(up)
    assert [product.out for product in own.products] == ["C_up", "C", "dC", "dA"]
    assert "dC *= C_up[M,N]; dC = silu_grad(dC, C[M,N]); " in str(own)


@pytest.mark.parametrize(
    ("letters", "last", "summed"),
    [
        ("N", "dbias[Z,N,O] = dC[Z,N,M] ones[M,O]", "ZO"),
        ("ZM", "dbias[Z,M,O] = dC[Z,M,N] ones[N,O]", "O"),
        ("Z", "dbias[Z,N,O] = dC[Z,M,N] ones[M,O]", "NO"),
        ("", "dbias[Z,N,O] = dC[Z,M,N] ones[M,O]", "ZNO"),
        ("NM", "dC[Z,N,M] = dE[Z,M,H] D[Z,N,H]", "Z"),
        ("ZMN", "dC[Z,M,N] = dE[Z,M,H] D[Z,N,H]", ""),
    ],
)
def test_what_changes_a_value_gets_its_gradient_summed_to_its_own_letters(letters, last, summed):
    plain = gemm_chain(M=2, N=3, K=4, H=5, batch=2)
    stages = (plain.stages[0], Elementwise("C", "add", "bias"), plain.stages[1])
    step = derive(Chain(plain.dims, (*plain.inputs, Input("bias", letters)), stages), STORED, 1, "bias")
    assert f"{last} | " in str(step)
    assert step.summed == summed


def test_every_state_that_is_read_is_a_value_of_its_own():
    plain = gemm_chain(M=2, N=3, K=4, H=5)
    stages = (
        plain.stages[0],
        Elementwise("C", "mul", "scale"),
        Elementwise("C", "relu"),
        Elementwise("C", "gelu"),
        plain.stages[1],
    )
    chain = Chain(plain.dims, (*plain.inputs, Input("scale", "MN")), stages)
    assert [product.out for product in derive(chain, STORED, 0, "A").chain.products] == ["C", "C_2", "dC", "dA"]
    text = str(derive(chain, STORED, 1, "scale"))
    assert text.startswith(
        "dscale += C[M,N] = A[M,K] B[K,N]; C *= scale[M,N]; C = relu(C); C_2[M,N] = A[M,K] B[K,N]; "
        "C_2 *= scale[M,N]; C_3[M,N] = A[M,K] B[K,N]; dC[M,N] = dE[M,H] D[N,H]; "
        "dC = gelu_grad(dC, C[M,N]); dC = relu_grad(dC, C_2[M,N]); dC *= C_3[M,N] | "
    )


def test_the_same_stage_twice_is_told_apart():
    plain = gemm_chain(M=2, N=3, K=4, H=5)
    shift, relu = Elementwise("C", "add", "shift"), Elementwise("C", "relu")
    chain = Chain(
        plain.dims, (*plain.inputs, Input("shift", "MN")), (plain.stages[0], shift, relu, shift, plain.stages[1])
    )
    assert "relu_grad" in str(derive(chain, STORED, 1, "shift"))
    assert "relu_grad" not in str(derive(chain, STORED, 3, "shift"))


def test_names_of_inputs_stay_apart():
    plain = gemm_chain(M=2, N=3, K=4, H=5, activation="relu")
    inputs = (Input("dE", "MK"), Input("dA", "KN"), Input("B_2", "NH"))
    stages = (MatMul("C", "dE", "dA", over="K"), plain.stages[1], MatMul("E", "C", "B_2", over="N"))
    step = derive(Chain(plain.dims, inputs, stages), STORED, 0, "dE")
    assert {str(source) for _, source in step.sources} == {"gradient(E)", "dE", "dA", "B_2"}
    assert step.chain.output not in dict(step.sources)


def test_too_many_products_are_refused():
    plain = gemm_chain(M=2, N=3, K=4, H=5)
    activations = (Elementwise("C", "relu"), Elementwise("C", "gelu"), Elementwise("C", "silu"))
    chain = Chain(plain.dims, plain.inputs, (plain.stages[0], *activations, plain.stages[1]))
    with pytest.raises(GradientError, match="the gradient of 'A' takes a chain of 5 products, accepted are 4: end"):
        derive(chain, STORED, 0, "A")
    assert len(derive(chain, STORED, 4, "D").chain.products) == 2


def test_no_letter_left_is_refused():
    plain = gemm_chain(M=2, N=3, K=4, H=5, activation="relu")
    batch = tuple(Dim(letter, 1, batch=True) for letter in string.ascii_uppercase if letter not in "MNKH")
    letters = "".join(dim.name for dim in batch)
    inputs = tuple(Input(tensor.name, letters + tensor.dims) for tensor in plain.inputs)
    with pytest.raises(GradientError, match="one letter more than the 26"):
        derive(Chain(batch + plain.dims, inputs, plain.stages), STORED, 0, "A")


def test_a_free_letter_comes_next_and_then_from_the_start():
    plain = gemm_chain(M=2, N=3, K=4, H=5, activation="relu")
    taken = tuple(
        Dim(letter, 1, batch=True) for letter in string.ascii_uppercase if letter > "L" and letter not in "MN"
    )
    letters = "L" + "".join(dim.name for dim in taken)
    dims = (Dim("L", 1, batch=True), *taken, *plain.dims)
    inputs = tuple(Input(tensor.name, letters + tensor.dims) for tensor in plain.inputs)
    assert "A" in derive(Chain(dims, inputs, plain.stages), STORED, 0, "A").chain.sizes
