import pytest
import torch
from closeness import assert_all_close, assert_equal_up_to_rounding
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from fusion import Chain, attention, gemm_chain, mlp
from fusion.plan import Causal, Dim, Elementwise, Input, MatMul, Softmax
from fusion.reference import run
from tests.fusion.computed import DTYPES, draw, results

ACTIVATIONS = {
    "identity": lambda x: x,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
}


def assert_means(chain, expected):
    """`run` and `expected` agree in the chain's dtype and in float64, for the output and every gradient."""
    tensors = draw(chain)
    truth = results(expected, tensors, torch.float64)
    assert_all_close(results(lambda t: run(chain, t), tensors, torch.float64), truth, truth)
    dtype = DTYPES[chain.dtype]
    assert_all_close(results(lambda t: run(chain, t), tensors, dtype), results(expected, tensors, dtype), truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"H": 3},
        {"scale": 0.3},
        {"mask": "ZGMN"},
        {"mask": "MN"},
        {"keep": "ZN"},
        {"keep": "ZGMN", "mask": "N"},
        {"causal": True},
        {"causal": True, "keep": "ZN", "mask": "MN"},
        {"causal": True, "diagonal": 4},
        {"causal": True, "diagonal": -2},
    ],
    ids=str,
)
def test_attention_is_torchs(options, dtype):
    M, N = 7, 11
    chain = attention(M=M, N=N, K=5, batch=2, heads=3, dtype=dtype, **options)

    def torchs(t):
        scores = torch.zeros((), dtype=t["A"].dtype)
        if "mask" in t:
            scores = scores + t["mask"]
        if "keep" in t:
            keep = t["keep"] if chain.tensors["keep"] == "ZGMN" else t["keep"][:, None, None, :]
            scores = scores + torch.zeros(keep.shape, dtype=scores.dtype).masked_fill(~keep, -torch.inf)
        if options.get("causal"):
            seen = torch.ones(M, N, dtype=torch.bool).tril(options.get("diagonal", 0))
            scores = scores + torch.zeros(M, N, dtype=scores.dtype).masked_fill(~seen, -torch.inf)
        scores = scores.expand(2, 3, M, N)
        scale = options.get("scale")
        return functional.scaled_dot_product_attention(t["A"], t["B"], t["D"], attn_mask=scores, scale=scale)

    assert_means(chain, torchs)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_heads_are_torchs(kv_heads):
    heads = 6
    chain = attention(M=5, N=9, K=4, H=3, batch=2, heads=heads, kv_heads=kv_heads)

    def torchs(t):
        output = functional.scaled_dot_product_attention(t["A"].flatten(1, 2), t["B"], t["D"], enable_gqa=True)
        return output.unflatten(1, (kv_heads, heads // kv_heads))

    assert_means(chain, torchs)


def test_a_query_without_a_key_gets_zeros_and_no_gradient():
    chain = attention(M=3, N=4, K=2, keep="MN", mask="MN")
    tensors = draw(chain)
    tensors["keep"] = torch.tensor([[True] * 4, [False] * 4, [False, True, True, False]])
    tensors["mask"][2] = -torch.inf  # an additive mask may do the same
    found = results(lambda t: run(chain, t), tensors, torch.float64)
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
    assert not found["output"][1:].any()
    assert not found["A"][1:].any()
    assert found["output"][0].all()
    assert found["A"][0].all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_mlps_are_made_of_linears(activation, gated, dtype):
    chain = mlp(M=5, K=7, N=9, H=6, activation=activation, gated=gated, bias=not gated, residual=gated, dtype=dtype)

    def linears(t):
        hidden = ACTIVATIONS[activation](functional.linear(t["A"], t["B"], t.get("bias_C")))
        if gated:
            hidden = hidden * functional.linear(t["A"], t["B_up"])
        output = functional.linear(hidden, t["D"], t.get("bias_E"))
        return output + t["residual"] if gated else output

    assert_means(chain, linears)


def test_weights_of_linear_modules_fit_as_they_are():
    up, down = nn.Linear(7, 9), nn.Linear(9, 7)
    x = torch.randn(5, 7)
    tensors = {"A": x, "B": up.weight, "bias_C": up.bias, "D": down.weight, "bias_E": down.bias}
    output = run(mlp(M=5, K=7, N=9, bias=True, activation="relu"), tensors)
    assert_equal_up_to_rounding("output", output, down(up(x).relu()), roundings=7 + 9 + 4)


def test_experts_are_mlps_side_by_side():
    chain = mlp(M=5, K=4, N=6, batch=3, gated=True, bias=True, residual=True, activation="silu")
    single = mlp(M=5, K=4, N=6, gated=True, bias=True, residual=True, activation="silu")
    assert_means(chain, lambda t: torch.stack([run(single, {k: v[z] for k, v in t.items()}) for z in range(3)]))


@pytest.mark.parametrize("batch", [None, 3])
def test_three_products(batch):
    chain = gemm_chain(M=5, N=7, K=3, H=9, P=2, batch=batch, activation="relu")
    assert_means(chain, lambda t: ((t["A"] @ t["B"]).relu() @ t["D"]).relu() @ t["F"])


def test_softmax_and_causal_may_end_a_chain_and_run_over_rows():
    dims, inputs = (Dim("M", 5), Dim("N", 4), Dim("K", 3)), (Input("A", "MK"), Input("B", "KN"))
    stages = (MatMul("C", "A", "B", over="K"), Causal("C", row="N", column="M"), Softmax("C", over="M"))
    seen = torch.ones(4, 5, dtype=torch.bool).tril().T
    assert_means(
        Chain(dims, inputs, stages),
        lambda t: (t["A"] @ t["B"]).masked_fill(~seen, -torch.inf).softmax(0),
    )


def test_a_product_may_take_an_earlier_one_on_its_right():
    dims = (Dim("M", 5), Dim("N", 4), Dim("K", 3), Dim("H", 2))
    inputs = (Input("A", "MK"), Input("B", "KN"), Input("D", "NH"))
    stages = (MatMul("C", "B", "D", over="N"), Elementwise("C", "add", 1.5), MatMul("E", "A", "C", over="K"))
    assert_means(Chain(dims, inputs, stages), lambda t: t["A"] @ (t["B"] @ t["D"] + 1.5))


@pytest.mark.parametrize(
    "chain",
    [
        gemm_chain(M=3, N=4, K=2, H=5, P=2, batch=2, activation="gelu"),
        attention(M=3, N=4, K=2, H=3, batch=1, heads=2, kv_heads=1, mask="MN", keep="ZN", causal=True),
        mlp(M=3, K=2, N=4, gated=True, bias=True, residual=True, activation="silu"),
    ],
    ids=["gemm_chain", "attention", "mlp"],
)
def test_gradients_are_derivatives(chain):
    tensors = draw(chain)
    names = [name for name in tensors if tensors[name].dtype != torch.bool]
    leaves = tuple(tensors[name].requires_grad_() for name in names)
    assert torch.autograd.gradcheck(lambda *values: run(chain, tensors | dict(zip(names, values, strict=True))), leaves)


small = st.integers(0, 4)


@settings(max_examples=50)
@given(M=small, N=small, K=small, H=small, batch=small, heads=st.integers(1, 2), repeats=st.integers(1, 2))
def test_any_size_runs_and_averages_of_ones_are_ones(M, N, K, H, batch, heads, repeats):
    chain = attention(M=M, N=N, K=K, H=H, batch=batch, heads=heads * repeats, kv_heads=heads)
    tensors = draw(chain) | {"D": torch.ones(chain.shape("D"), dtype=torch.float64)}
    output = run(chain, tensors)
    assert output.shape == chain.shape("E")
    expected = torch.ones_like(output) if N else torch.zeros_like(output)
    assert_equal_up_to_rounding("output", output, expected, roundings=2 * N)


@settings(max_examples=50)
@given(data=st.data(), sizes=st.tuples(small, small, small, small, small))
def test_storage_order_does_not_matter(data, sizes):
    options = dict(zip(["M", "N", "K", "H", "batch"], sizes, strict=True))
    chain = attention(heads=2, mask="GMN", keep="ZN", **options)
    stored = tuple(Input(x.name, "".join(data.draw(st.permutations(x.dims)))) for x in chain.inputs)
    tensors = draw(chain)
    permuted = {x.name: tensors[x.name].permute([chain.tensors[x.name].index(d) for d in x.dims]) for x in stored}
    output = run(Chain(chain.dims, stored, chain.stages), permuted)
    assert_equal_up_to_rounding("output", output, run(chain, tensors), roundings=64)


def test_inputs_come_in_any_order():
    chain = attention(M=3, N=4, K=2, keep="N")
    tensors = draw(chain)
    assert torch.equal(run(Chain(chain.dims, chain.inputs[::-1], chain.stages), tensors), run(chain, tensors))


def test_runs_repeat_bitwise_and_leave_their_inputs_alone():
    chain = attention(M=33, N=65, K=17, batch=2, heads=4, kv_heads=2, mask="MN", keep="ZN", causal=True)
    tensors = draw(chain, torch.float32)
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    first = run(chain, tensors)
    assert torch.equal(first, run(chain, tensors))
    assert tensors.keys() == copies.keys()
    assert all(torch.equal(tensors[name], copies[name]) for name in copies)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"D": None}, ValueError, r"names \['A', 'B', 'keep'\]; this chain needs \['A', 'B', 'D', 'keep'\]"),
        ({"extra": torch.zeros(1)}, ValueError, "extra"),
        ({"B": torch.zeros(4, 3)}, ValueError, r"tensors\['B'\] has shape \(4, 3\); B\[N,K\] is \(3, 4\) here"),
        ({"B": torch.zeros(3, 4).half()}, TypeError, r"tensors\['B'\] is torch.float16, not torch.float32"),
        ({"B": torch.zeros(3, 4).double()}, TypeError, r"tensors\['B'\] is torch.float64, not torch.float32"),
        ({"keep": torch.zeros(3)}, TypeError, r"tensors\['keep'\] is torch.float32, not torch.bool"),
        ({"B": [[0.0]]}, TypeError, r"tensors\['B'\] is a list; pass a torch.Tensor"),
        ({"B": torch.zeros(3, 4, device="meta")}, ValueError, r"tensors\['B'\] is on meta, 'A' on cpu"),
    ],
)
def test_wrong_tensors_are_refused(change, error, message):
    chain = attention(M=2, N=3, K=4, keep="N")
    tensors = draw(chain, torch.float32) | change
    with pytest.raises(error, match=message):
        run(chain, {name: tensor for name, tensor in tensors.items() if tensor is not None})
