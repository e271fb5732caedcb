import ast
import dataclasses
from pathlib import Path

import pytest
import torch
from closeness import FUSED_FACTOR, assert_close
from fused_chains import (
    ACTIVATIONS,
    GRADIENTS,
    any_chains,
    assert_fused,
    assert_fused_by,
    attentions,
    draw_tensors,
    gemm_chains,
    mlps,
    schedules,
    to,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fusion.emit
from fusion import Chain, attention, gemm_chain, mlp
from fusion.emit.triton import emit
from fusion.plan import Causal, Dim, Elementwise, Input, MatMul, Softmax
from fusion.plan.expression import expressions
from fusion.plan.prune import repeated_finish, split_softmax
from fusion.plan.schedule import schedule
from fusion.reference import run
from fusion.run.triton.launch import launch, launch_with_lse

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # of numpy, where -inf is meant
DTYPES = ("fp32", "fp16", "bf16")
TWO = {"M": 40, "N": 50, "K": 36, "H": 23}
TILES = {"M": 32, "N": 16, "K": 16, "H": 16}


def random_pairs(number):
    return settings(max_examples=number, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])


@random_pairs(50)
@given(data=st.data(), chain=gemm_chains())
def test_random_gemm_chains_in_random_schedules(data, chain):
    assert_fused(chain, data.draw(schedules(chain)))


@random_pairs(50)
@given(data=st.data(), chain=attentions())
def test_random_attention_in_random_schedules(data, chain):
    assert_fused(chain, data.draw(schedules(chain)))


@random_pairs(40)
@given(data=st.data(), chain=mlps())
def test_random_mlps_in_random_schedules(data, chain):
    assert_fused(chain, data.draw(schedules(chain)))


@random_pairs(60)
@given(data=st.data(), chain=any_chains())
def test_random_stages_letters_and_orders_in_random_schedules(data, chain):
    assert_fused(chain, data.draw(schedules(chain)))


@pytest.mark.parametrize("expression", [str(e) for e in expressions(gemm_chain(M=1, N=1, K=1, H=1))])
def test_every_expression_of_two_products(expression):
    assert_fused_by(gemm_chain(**TWO, activation="silu"), expression, **TILES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("expression", ["mhnk", "mn(k,h)", "nmkh"])
def test_online_softmax(expression, dtype):
    chain = attention(**TWO, batch=2, mask="MN", keep="ZN", dtype=dtype)
    assert_fused_by(chain, expression, **TILES)


@pytest.mark.parametrize("expression", ["mhnk", "nhmk"])
@pytest.mark.parametrize("over", ["M", "N"])
def test_softmax_in_place(over, expression):
    """Over either letter of an intermediate, whose loop does not turn, and over the output's."""
    chain = gemm_chain(M=40, N=50, K=20, H=23)
    first, second = chain.products
    for stages in ((first, Softmax("C", over), second), (first, second, Softmax("E", over.replace("N", "H")))):
        assert_fused_by(dataclasses.replace(chain, stages=stages), expression, M=48, N=64, K=16, H=32)


@pytest.mark.parametrize("diagonal", [-70, -33, -7, 0, 5, 16, 100])
@pytest.mark.parametrize("expression", ["mhnk", "mn(k,h)"])
def test_causal_masks_skip_only_what_is_masked(expression, diagonal):
    chain = attention(M=70, N=60, K=20, causal=True, diagonal=diagonal)
    assert_fused_by(chain, expression, M=16, N=16, K=32, H=16)


def test_rows_without_an_entry_are_zero_and_never_nan():
    chain = attention(M=40, N=50, K=16, mask="MN", keep="M")
    tensors = draw_tensors(chain)
    tensors["keep"][3:20] = False
    tensors["mask"][30, :] = -torch.inf
    tensors["mask"][31, :16] = -torch.inf  # its first tile has no entry
    for expression, N in (("mhnk", 16), ("mn(k,h)", 16), ("mhnk", 64)):
        assert_fused_by(chain, expression, tensors, M=16, N=N, K=16, H=16)
        kernel = emit(chain, schedule(chain, expression, {"M": 16, "N": N, "K": 16, "H": 16}))
        output = launch(kernel, chain, to(tensors, torch.float32))
        assert not output[3:20].any()
        assert not output[30].any()


def two_products(*stages, **inputs):
    """C = A B with stages, read by E = C D."""
    chain = gemm_chain(**TWO)
    first, second = chain.products
    given = (*chain.inputs, *(Input(name, letters) for name, letters in inputs.items()))
    return dataclasses.replace(chain, inputs=given, stages=(first, *stages, second))


@pytest.mark.parametrize("letters", ["", "M", "N", "MN", "NM"])
@pytest.mark.parametrize("operation", ["add", "mul", *GRADIENTS])
def test_operations_with_a_tensor(operation, letters):
    assert_fused_by(two_products(Elementwise("C", operation, "y"), y=letters), "mhnk", **TILES)


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_activations(activation):
    assert_fused_by(two_products(Elementwise("C", activation)), "mhnk", **TILES)


@pytest.mark.parametrize("number", [0.25, -3.0])
def test_numbers(number):
    chain = two_products(Elementwise("C", "mul", number), Elementwise("C", "add", number))
    assert_fused_by(chain, "mhnk", **TILES)


@pytest.mark.parametrize("letters", ["", "M", "N", "MN", "NM"])
def test_masks_with_a_known_log_sum_exp(letters):
    stages = (Elementwise("C", "mask", "keep"), Elementwise("C", "exp_minus", "lse"))
    chain = two_products(*stages, keep=letters, lse="M")
    tensors = draw_tensors(chain)
    tensors["lse"][5] = -torch.inf
    assert_fused_by(chain, "mhnk", tensors, **TILES)


@pytest.mark.parametrize("operation", ["add", "mul", "silu_grad", "gelu_grad", "gelu_tanh_grad", "exp_minus"])
def test_operations_with_another_value(operation):
    """A gate; its sum runs over a loop that the other products lack."""
    plain = gemm_chain(**TWO)
    dims, inputs = (*plain.dims, Dim("T", 20)), (*plain.inputs, Input("X", "MT"), Input("Y", "TN"))
    first, second = plain.products
    gate = MatMul("Q", "X", "Y", over="T")
    chain = Chain(dims, inputs, (gate, first, Elementwise("C", operation, "Q"), second))
    for expression in ("mhn(t,k)", "mn(t,k,h)", "tmhnk"):
        assert_fused_by(chain, expression, T=16, **TILES)


def test_a_value_that_is_read_after_the_loop_it_is_made_in():
    """C is made in every round of t and read when t is over."""
    chain = gemm_chain(M=32, N=32, K=32, H=32)
    first, second = chain.products
    gate = (MatMul("Q", "X", "Y", over="T"), second, Elementwise("E", "mul", "Q"))
    inputs = (*chain.inputs, Input("X", "MT"), Input("Y", "TH"))
    chain = Chain((*chain.dims, Dim("T", 32)), inputs, (first, *gate))
    for expression in ("thmnk", "tkhmn"):
        assert_fused_by(chain, expression, M=16, N=16, K=16, H=16, T=16)


def test_gradients_of_attention_skip_masked_blocks_along_rows_and_columns():
    """dV = P^T dO, whose loop runs over the rows, and dQ = (P * (dO V^T - delta)) K, whose loop runs over columns."""
    dims = tuple(Dim(letter, size) for letter, size in {"M": 70, "N": 60, "K": 20, "H": 24}.items())
    inputs = {"A": "MK", "B": "NK", "lse": "M", "dE": "MH"}
    P = (MatMul("P", "A", "B", over="K"), Causal("P", "M", "N", -5), Elementwise("P", "exp_minus", "lse"))
    dV = Chain(dims, tuple(Input(*item) for item in inputs.items()), (*P, MatMul("dD", "P", "dE", over="M")))
    kernel = emit(dV, schedule(dV, "nhmk", {"M": 16, "N": 16, "K": 32, "H": 32}))
    assert "range(tl.maximum(0, n - -5) // 16 * 16, 70, 16)" in kernel.source
    assert_fused_by(dV, "nhmk", M=16, N=16, K=32, H=32)
    inputs |= {"D": "NH", "delta": "M", "again": "NJ"}
    dP = (MatMul("dP", "dE", "D", over="H"), Elementwise("dP", "add", "delta"), Elementwise("P", "mul", "dP"))
    dQ = Chain(
        (*dims, Dim("J", 20)),
        tuple(Input(*item) for item in inputs.items()),
        (*P, *dP, MatMul("dA", "P", "again", over="N")),
    )
    kernel = emit(dQ, schedule(dQ, "mjn(k,h)", {"M": 16, "N": 16, "K": 32, "H": 32, "J": 32}))
    assert "range(0, tl.minimum(60, m + 11), 16)" in kernel.source
    assert_fused_by(dQ, "mjn(k,h)", M=16, N=16, K=32, H=32, J=32)


def test_both_operands_of_a_product_may_be_padded_values():
    """What is no entry of either is not zero after `add`, and must not be summed."""
    dims = tuple(Dim(letter, size) for letter, size in {"M": 20, "N": 21, "K": 22, "H": 23, "J": 24}.items())
    inputs = {"A": "MK", "B": "KN", "X": "NJ", "Y": "JH"}
    stages = (
        MatMul("C", "A", "B", over="K"), Elementwise("C", "add", 1.5),
        MatMul("Q", "X", "Y", over="J"), Elementwise("Q", "add", -2.0),
        MatMul("E", "Q", "C", over="N"),
    )  # fmt: skip
    chain = Chain(dims, tuple(Input(*item) for item in inputs.items()), stages)
    for N in (16, 32):
        assert_fused_by(chain, "mhn(k,j)", M=32, N=N, K=32, H=16, J=16)


@pytest.mark.parametrize("tile", [5, 16, 24, 33, 48, 64])
def test_any_tile_size(tile):
    chain = attention(M=33, N=49, K=24, H=40)
    assert_fused_by(chain, "mhnk", M=tile, N=tile, K=24, H=tile)


@pytest.mark.parametrize("sizes", [{"K": 0}, {"N": 0}, {"M": 0}, {"H": 0}, {"batch": 0}], ids=str)
@pytest.mark.parametrize("softmax", [False, True])
def test_zero_sizes(sizes, softmax):
    options = {"M": 5, "N": 7, "K": 6, "H": 4, "batch": 2} | sizes
    chain = attention(mask="MN", **options) if softmax else mlp(bias=True, residual=True, **options)
    assert_fused_by(chain, "mhnk", M=16, N=16, K=16, H=16)


@pytest.mark.parametrize(("M", "N", "K", "H"), [(1, 1, 1, 1), (1, 17, 1, 3), (3, 1, 40, 1)])
def test_sizes_of_one(M, N, K, H):
    chain = attention(M=M, N=N, K=K, H=H, dtype="fp16")
    assert_fused_by(chain, "mhnk", M=16, N=16, K=16, H=16)


def test_views_need_no_copy():
    chain = attention(M=20, N=30, K=16, heads=4, kv_heads=2, batch=2, keep="ZN")
    plan = schedule(chain, "mhnk", {"M": 16, "N": 16, "K": 16, "H": 16})
    A, B, D = (torch.randn(2, n, 3, heads, 16)[:, :, 1].transpose(1, 2) for n, heads in ((20, 4), (30, 2), (30, 2)))
    keep = (torch.rand(1, 1) < 2).expand(2, 30)
    tensors = {"A": A.unflatten(1, (2, 2)), "B": B, "D": D, "keep": keep}
    output = launch(emit(chain, plan), chain, tensors)
    truth = run(chain, to(tensors, torch.float64))
    assert_close("output", output, run(chain, tensors), truth, factor=FUSED_FACTOR)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize(("expression", "N"), [("mhnk", 16), ("mn(k,h)", 16), ("nmkh", 16), ("mhnk", 64)])
def test_log_sum_exp(expression, N, dtype):
    chain = attention(
        M=40, N=50, K=20, H=24, batch=2, heads=4, kv_heads=2, mask="NM", causal=True, diagonal=-3, dtype=dtype
    )
    tensors = draw_tensors(chain)
    kernel = emit(chain, schedule(chain, expression, {"M": 16, "N": N, "K": 16, "H": 16}), save_lse=True)
    assert kernel.tensors[-1] == ("lse", "ZGRM")
    assert kernel.fp32 == {"lse"}
    output, lse = launch_with_lse(
        kernel, chain, to(tensors, getattr(torch, {"fp32": "float32", "fp16": "half"}[dtype]))
    )
    assert lse.dtype == torch.float32
    scores = torch.einsum("zgrmk,zgnk->zgrmn", tensors["A"], tensors["B"]) * 20**-0.5 + tensors["mask"].T
    seen = torch.ones(40, 50, dtype=torch.bool).tril(-3)
    truth = scores.masked_fill(~seen, -torch.inf).logsumexp(-1)
    assert torch.isneginf(lse[..., :3]).all()
    seen_float = scores.float().masked_fill(~seen, -torch.inf).logsumexp(-1)
    assert_close("lse", lse[..., 3:], seen_float[..., 3:], truth[..., 3:])
    assert torch.isfinite(output).all()


@pytest.mark.parametrize("save_lse", [False, True])
def test_an_exact_output_is_the_output_before_it_is_rounded(save_lse):
    chain = attention(M=20, N=30, K=16, H=24, dtype="fp16")
    plan = schedule(chain, "mhnk", dict.fromkeys("MNKH", 16))
    tensors = to(draw_tensors(chain), torch.float16)
    rounded, exact = (
        (launch_with_lse if save_lse else launch)(emit(chain, plan, exact=exact, save_lse=save_lse), chain, tensors)
        for exact in (False, True)
    )
    if save_lse:
        (rounded, lse), (exact, same) = rounded, exact
        assert torch.equal(lse, same)
    assert (rounded.dtype, exact.dtype) == (torch.float16, torch.float32)
    assert torch.equal(exact.half(), rounded)
    assert not torch.equal(exact, rounded.float())


def test_log_sum_exp_needs_one_softmax_and_a_name_that_is_free():
    chain = gemm_chain(M=16, N=16, K=16, H=16)
    plan = schedule(chain, "mhnk", dict.fromkeys("MNKH", 16))
    with pytest.raises(ValueError, match="save_lse=True needs a chain with one softmax; this one has 0"):
        emit(chain, plan, save_lse=True)
    chain = attention(M=16, N=16, K=16)
    inputs = (*chain.inputs[:2], Input("lse", "NH"))
    chain = Chain(chain.dims, inputs, (*chain.stages[:-1], MatMul("E", "C", "lse", over="N")))
    assert emit(chain, plan, save_lse=True).tensors[-1] == ("lse_", "M")


def test_names_never_clash():
    """Names that are keywords, Triton's, or look like variables of the kernel."""
    names = ["for", "tl", "A_M", "A", "acc_C_MN", "m", "block"]
    dims = tuple(Dim(letter, size) for letter, size in TWO.items())
    A, B, D, *biases = names
    stages = [MatMul("i_M", A, B, over="K"), MatMul("range", "i_M", D, over="N")]
    stages[1:1] = [Elementwise("i_M", "add", name) for name in biases]
    inputs = [Input(A, "MK"), Input(B, "KN"), Input(D, "NH"), *(Input(name, "M") for name in biases)]
    assert_fused_by(Chain(dims, tuple(inputs), tuple(stages)), "mn(k,h)", **TILES)


def test_schedules_that_are_not_legal_are_refused():
    chain = attention(M=64, N=64, K=64, H=64)
    with pytest.raises(
        ValueError, match=r"softmax of C over N: n must be a single tile; take one that fusion\.plan\.prune"
    ):
        emit(dataclasses.replace(chain, stages=(*chain.stages[:-1], Elementwise("C", "add", 1.0), chain.stages[-1])),
             schedule(chain, "mhnk", dict.fromkeys("MNKH", 16)))  # fmt: skip


def test_every_legal_schedule_of_three_products_with_a_softmax_is_emitted():
    chain = gemm_chain(M=32, N=32, K=32, H=32, P=32)
    stages = [stage for product in chain.products for stage in (product, Softmax(product.out, "N"))][:2]
    chain = dataclasses.replace(chain, stages=(*stages, *chain.products[1:]))
    checked = 0
    for expression in expressions(chain)[::7]:
        plan = schedule(chain, str(expression), dict.fromkeys(chain.loops, 16))
        program = plan.program(chain)
        if repeated_finish(chain, program) or split_softmax(chain, program):
            with pytest.raises(ValueError, match="schedule="):
                emit(chain, plan)
        else:
            assert_fused(chain, plan)
            checked += 1
    assert checked > 3


def test_the_text_says_what_it_is_and_depends_on_nothing_else():
    chain = attention(M=512, N=512, K=64, batch=2, dtype="fp16", causal=True)
    plan = schedule(chain, "mhnk", {"M": 64, "N": 64, "K": 64, "H": 64}, num_warps=8, num_stages=3)
    kernel = emit(chain, plan)
    assert kernel == emit(chain, plan)
    assert str(chain) in kernel.source
    assert str(plan) in kernel.source
    assert str(plan.program(chain)) in kernel.source
    assert (kernel.name, kernel.programs, kernel.num_warps, kernel.num_stages) == ("fused_C_E", 16, 8, 3)
    assert kernel.arguments[:6] == ("A_ptr", "B_ptr", "D_ptr", "E_ptr", "A_Z_stride", "A_M_stride")
    assert len(kernel.arguments) == 4 + 4 * 3
    assert "mask=" not in kernel.source


def test_fp32_is_never_rounded_to_tf32():
    for chain in (gemm_chain(**TWO), attention(**TWO)):
        source = emit(chain, schedule(chain, "mhnk", TILES)).source
        assert source.count("tl.dot(") == source.count('input_precision="ieee"') == 2


def test_emitting_needs_neither_torch_nor_triton():
    for path in Path(fusion.emit.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"torch", "triton"}, path.name
