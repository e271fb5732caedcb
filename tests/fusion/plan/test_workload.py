import pytest

from fusion.plan import Elementwise, MatMul, attention, gemm_chain, mlp


def test_a_gemm_chain_is_as_long_as_its_letters():
    assert [p.out for p in gemm_chain(M=2, N=3, K=4).products] == ["C"]
    assert [p.out for p in gemm_chain(M=2, N=3, K=4, H=5).products] == ["C", "E"]
    assert [p.out for p in gemm_chain(M=2, N=3, K=4, H=5, P=0).products] == ["C", "E", "G"]


def test_p_needs_h():
    with pytest.raises(ValueError, match="P=6 without H"):
        gemm_chain(M=2, N=3, K=4, P=6)


def test_an_activation_stands_between_products_only():
    assert not gemm_chain(M=2, N=3, K=4, activation="relu").epilogue("C")
    chain = gemm_chain(M=2, N=3, K=4, H=5, activation="gelu_tanh")
    assert chain.epilogue("C") == (Elementwise("C", "gelu_tanh"),)
    assert chain.epilogue("E") == ()


@pytest.mark.parametrize("build", [gemm_chain, mlp])
def test_unknown_activations_are_refused(build):
    assert build(M=2, N=3, K=4, H=4, activation="identity").epilogue("C") == ()
    with pytest.raises(ValueError, match="activation='swish' must be one of"):
        build(M=2, N=3, K=4, H=4, activation="swish")


@pytest.mark.parametrize("batch", [None, 0, 1])
def test_a_batch_of_any_size_is_a_letter_and_none_is_not(batch):
    for chain in (gemm_chain(M=2, N=3, K=4, H=5, batch=batch), mlp(M=2, N=3, K=4, batch=batch, bias=True)):
        assert chain.batch == ("" if batch is None else "Z")
        assert all(dims.startswith(chain.batch) for dims in chain.tensors.values())


def test_a_value_is_as_long_as_a_key_unless_told():
    assert attention(M=2, N=3, K=4).shape("E") == (2, 4)
    assert attention(M=2, N=3, K=4, H=5).shape("E") == (2, 5)
    assert mlp(M=2, N=3, K=4).shape("E") == (2, 4)
    assert mlp(M=2, N=3, K=4, H=5).shape("E") == (2, 5)


def test_heads_that_share_nothing_have_no_letter_for_sharing():
    assert attention(M=2, N=3, K=4, heads=6) == attention(M=2, N=3, K=4, heads=6, kv_heads=6)
    assert attention(M=2, N=3, K=4, heads=6).batch == "G"
    assert attention(M=2, N=3, K=4, heads=6, kv_heads=1).shape("A") == (1, 6, 2, 4)


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 4), (6, 0), (6, -2), (None, 2), (2, 6), (0, None)])
def test_kv_heads_divide_heads(heads, kv_heads):
    with pytest.raises(ValueError, match=f"kv_heads={heads if kv_heads is None else kv_heads} .*heads={heads}"):
        attention(M=2, N=3, K=4, heads=heads, kv_heads=kv_heads)


def test_the_scale_is_one_over_the_root_of_k_unless_told():
    assert attention(M=2, N=3, K=16).stages[1] == Elementwise("C", "mul", 0.25)
    assert attention(M=2, N=3, K=16, scale=2).stages[1] == Elementwise("C", "mul", 2.0)
    assert attention(M=2, N=3, K=0).stages[1] == Elementwise("C", "mul", 1.0)


def test_a_diagonal_without_causal_is_refused():
    with pytest.raises(ValueError, match="diagonal=3 without causal=True"):
        attention(M=2, N=3, K=4, diagonal=3)


@pytest.mark.parametrize("argument", ["mask", "keep"])
def test_masks_index_scores(argument):
    with pytest.raises(ValueError, match=f"'{argument}'.*'MK'.*must be among x's 'MN'"):
        attention(M=2, N=3, K=4, **{argument: "MK"})


def test_the_gate_is_ready_before_it_multiplies():
    chain = mlp(M=2, N=3, K=4, gated=True, activation="relu")
    kinds = [stage.out if isinstance(stage, MatMul) else stage.operation for stage in chain.stages]
    assert kinds == ["C_up", "C", "relu", "mul", "E"]
