from functools import cache

import pytest
import torch
from closeness import FUSED_FACTOR, allowed_error, assert_all_close, assert_equal_up_to_rounding, largest_error
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from fusion.plan import Chain, Dim, Elementwise, Input, MatMul, Softmax, attention, gemm_chain, mlp
from fusion.plan.derived import GradientError
from fusion.plan.gradient import gradients
from fusion.reference import run
from fusion.run.autograd import apply
from tests.fusion.computed import DTYPES, ORDERS, draw, in_another_order, results, upstream
from tests.fusion.differentiable import ACTIVATIONS, chains
from tests.fusion.executor import InAnyOrder, Interpreter, execute

# At most four sums in a row, of at most 17 terms each, and 32 operations between; the exponent of a score as large as
# 16 multiplies what is rounded by as much.
ROUNDINGS = 16 * (4 * 17 + 32)


def joined(found):
    """All entries: where a gradient vanishes its own size does not tell what a rounding is."""
    return torch.cat([found[name].flatten() for name in sorted(found)])


def assert_gradients(chain, tensors=None):
    """Those of the derived chains are the reference's in float64, and in the chain's dtype as close as they are."""
    tensors = draw(chain) if tensors is None else tensors
    truth = results(lambda t: run(chain, t), tensors, torch.float64)
    found = results(lambda t: apply(chain, t, execute), tensors, torch.float64)
    assert found.keys() == truth.keys()
    assert_equal_up_to_rounding("output and gradients", joined(found), joined(truth), roundings=ROUNDINGS)
    dtype = DTYPES[chain.dtype]
    reference = results(lambda t: run(chain, t), tensors, dtype)
    assert_all_close(results(lambda t: apply(chain, t, execute), tensors, dtype), reference, truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [None, 2])
@pytest.mark.parametrize("activation", ["identity", *ACTIVATIONS])
@pytest.mark.parametrize("sizes", [{}, {"H": 9}, {"H": 9, "P": 3}], ids=["one", "two", "three"])
def test_gemm_chains(sizes, activation, batch, dtype):
    assert_gradients(gemm_chain(M=5, N=7, K=11, **sizes, activation=activation, batch=batch, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch": 2, "heads": 3},
        {"batch": 2, "heads": 4, "kv_heads": 2},
        {"heads": 4, "kv_heads": 1, "H": 3},
        {"heads": 2, "mask": "GMN"},
        {"batch": 2, "heads": 4, "kv_heads": 2, "mask": "MN"},
        {"mask": "N"},
        {"batch": 2, "keep": "ZN"},
        {"causal": True},
        {"causal": True, "diagonal": 4, "heads": 2, "keep": "MN", "mask": "N"},
        {"causal": True, "diagonal": -3},
        {"scale": -0.5},
    ],
    ids=str,
)
def test_attention(options, dtype):
    assert_gradients(attention(M=13, N=17, K=5, dtype=dtype, **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["identity", *ACTIVATIONS])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("extras", [{}, {"bias": True, "residual": True}, {"batch": 2, "bias": True}], ids=str)
def test_mlps(extras, gated, activation, dtype):
    assert_gradients(mlp(M=5, K=7, N=11, H=6, gated=gated, activation=activation, dtype=dtype, **extras))


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_shared_along_a_batch(dtype):
    dims = (Dim("Z", 3, batch=True), Dim("M", 5), Dim("N", 7), Dim("K", 4), Dim("H", 6))
    inputs = (Input("A", "ZMK"), Input("B", "NK"), Input("bias", "N"), Input("D", "HN"))
    stages = (
        MatMul("C", "A", "B", over="K"),
        Elementwise("C", "add", "bias"),
        Elementwise("C", "gelu"),
        MatMul("E", "C", "D", over="N"),
    )
    assert_gradients(Chain(dims, inputs, stages, dtype))


TAILS = {
    "activation": (Elementwise("E", "mul", 0.5), Elementwise("E", "gelu")),
    "softmax": (Elementwise("E", "add", "bias"), Softmax("E", over="H")),
    "gate": (Elementwise("E", "silu"), Elementwise("E", "mul", "gate"), Elementwise("E", "add", "bias")),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("scores", [False, True])
def test_stages_of_the_output(scores, tail, dtype):
    plain = attention(M=5, N=7, K=4, H=6, causal=True) if scores else gemm_chain(M=5, N=7, K=4, H=6)
    read = {stage.operand for stage in TAILS[tail] if isinstance(stage, Elementwise)}
    extras = tuple(x for x in (Input("bias", "H"), Input("gate", "HM")) if x.name in read)
    assert_gradients(Chain(plain.dims, plain.inputs + extras, plain.stages + TAILS[tail], dtype))


def test_a_gated_output_without_a_second_matrix():
    dims = (Dim("M", 5), Dim("N", 7), Dim("K", 4))
    inputs = (Input("A", "MK"), Input("B", "KN"), Input("V", "KN"))
    up = (MatMul("U", "A", "V", over="K"), Elementwise("U", "silu"))
    assert_gradients(Chain(dims, inputs, (*up, MatMul("C", "A", "B", over="K"), Elementwise("C", "mul", "U"))))


@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_without_a_key_pass_no_gradient(dtype):
    chain = attention(M=3, N=4, K=2, keep="MN", mask="MN", dtype=dtype)
    tensors = draw(chain)
    tensors["keep"] = torch.tensor([[True] * 4, [False] * 4, [False, True, True, False]])
    tensors["mask"][2] = -torch.inf
    assert_gradients(chain, tensors)
    assert not results(lambda t: apply(chain, t, execute), tensors, DTYPES[dtype])["A"][1:].any()


@pytest.mark.parametrize("size", ["M", "N", "K", "H", "batch"])
def test_sizes_of_zero(size):
    sizes = {"M": 2, "N": 3, "K": 4, "H": 5, "batch": 2} | {size: 0}
    assert_gradients(attention(**sizes))
    assert_gradients(gemm_chain(**sizes, activation="gelu"))


@settings(max_examples=200)
@given(chain=chains())
def test_random_chains(chain):
    tensors = draw(chain)
    try:
        found = results(lambda t: apply(chain, t, execute), tensors, torch.float64)
    except GradientError:
        reject()
    truth = results(lambda t: run(chain, t), tensors, torch.float64)
    shapes = {name: gradient.shape for name, gradient in found.items()}
    assert shapes == {name: gradient.shape for name, gradient in truth.items()}
    assert_equal_up_to_rounding("output and gradients", joined(found), joined(truth), roundings=ROUNDINGS)


class Recorder:
    """An executor that notes what it ran."""

    def __init__(self):
        self.ran = []

    def __call__(self, chain, tensors, *, exact=False, save_lse=False):
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
            tensor.name: chain.shape(tensor.name) for tensor in chain.inputs
        }
        self.ran.append((chain, save_lse))
        return execute(chain, tensors, exact=exact, save_lse=save_lse)


@pytest.mark.parametrize(
    "chain",
    [
        mlp(M=3, K=4, N=5, gated=True, bias=True, residual=True),
        attention(M=3, N=4, K=2),
        gemm_chain(M=2, N=3, K=4, H=5, P=6, activation="relu"),
    ],
    ids=["mlp", "attention", "three"],
)
def test_only_planned_chains_run_and_only_what_is_needed_gets_a_gradient(chain):
    names = [tensor.name for tensor in chain.inputs]
    for needed in names:
        recorder = Recorder()
        tensors = draw(chain, torch.float32)
        tensors[needed].requires_grad_()
        output = apply(chain, tensors, recorder)
        plan = gradients(chain, [needed])
        assert recorder.ran == [(chain, plan.saves_forward)]
        output.sum().backward()
        assert [ran for ran, _ in recorder.ran].count(chain) == 1
        assert {ran for ran, _ in recorder.ran} == {chain, *plan.chains}
        assert [name for name in names if tensors[name].grad is not None] == [needed]


@pytest.mark.parametrize("grad_enabled", [False, True])
def test_without_a_gradient_the_chain_runs_and_nothing_else(grad_enabled):
    chain, recorder = attention(M=2, N=3, K=4), Recorder()
    tensors = {name: t.requires_grad_(not grad_enabled) for name, t in draw(chain, torch.float32).items()}
    with torch.set_grad_enabled(grad_enabled):
        output = apply(chain, tensors, recorder)
    assert recorder.ran == [(chain, False)]
    assert not output.requires_grad


def test_tensors_are_the_chains():
    chain = attention(M=2, N=3, K=4)
    tensors = draw(chain, torch.float32)
    with pytest.raises(ValueError, match=r"tensors has the names \['A', 'B'\]; this chain needs"):
        apply(chain, {"A": tensors["A"], "B": tensors["B"]}, execute)


def test_a_chain_without_gradients_is_refused_when_it_runs_not_later():
    plain = gemm_chain(M=2, N=3, K=4)
    stages = (*plain.stages, Elementwise("C", "relu_grad", "x"))
    chain = Chain(plain.dims, (*plain.inputs, Input("x", "MN")), stages)
    tensors = draw(chain, torch.float32)
    assert not apply(chain, tensors, execute).requires_grad
    tensors["A"].requires_grad_()
    with pytest.raises(GradientError, match="is a gradient's stage"):
        apply(chain, tensors, execute)


@pytest.mark.parametrize(
    ("chain", "kept"),
    [
        (gemm_chain(M=20, N=30, K=4, H=5, activation="gelu"), []),
        (gemm_chain(M=20, N=30, K=4, H=5, P=6, activation="gelu"), []),
        (mlp(M=20, K=4, N=30, gated=True, bias=True, residual=True), []),
        (attention(M=20, N=30, K=4, H=5, causal=True), [(20, 5), (20,)]),
    ],
    ids=["two", "three", "mlp", "attention"],
)
def test_no_intermediate_is_kept(chain, kept):
    tensors = {name: t.requires_grad_() for name, t in draw(chain, torch.float32).items()}
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        apply(chain, tensors, execute)
    assert shapes == [chain.shape(tensor.name) for tensor in chain.inputs] + kept


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_row_statistics_are_twice_as_exact_as_a_number_of_their_dtype(dtype):
    chain = attention(M=5, N=300, K=4, H=8, keep="M", dtype=dtype)
    tensors = draw(chain, DTYPES[dtype]) | {"keep": torch.tensor([True, True, True, True, False])}
    seen = {}

    def spy(ran, given, **options):
        seen.update({name: given[name].double() for name in given if name.startswith(("neg_", "lse"))})
        return execute(ran, given, **options)

    tensors["A"].requires_grad_()
    output = apply(chain, tensors, spy)
    assert output.dtype == DTYPES[dtype]
    given = upstream(output, DTYPES[dtype])
    output.backward(given)
    exact, exact_lse = execute(chain, tensors, exact=True, save_lse=True)
    assert exact.dtype == exact_lse.dtype == torch.float32
    squared = torch.finfo(DTYPES[dtype]).eps ** 2
    lse = seen["lse_rest"] - seen["neg_lse"]
    assert lse[4].item() == -torch.inf
    assert (lse - exact_lse)[:4].abs().max() <= squared * exact_lse[:4].abs().max()
    delta = (given.double() * exact.double()).sum(-1)
    assert (seen["neg_delta"] + seen["neg_delta_rest"] + delta).abs().max() <= squared * delta.abs().max()


@pytest.mark.parametrize(
    "change",
    [torch.sum, lambda x: (x.transpose(-1, -2) @ torch.arange(5.0, dtype=x.dtype)).sum()],
    ids=["expanded", "transposed"],
)
def test_upstream_gradients_come_with_any_strides(change):
    chain = attention(M=5, N=7, K=4, heads=2, causal=True)
    tensors = draw(chain)
    found = results(lambda t: change(apply(chain, t, execute)), tensors, torch.float64)
    truth = results(lambda t: change(run(chain, t)), tensors, torch.float64)
    assert_equal_up_to_rounding("output and gradients", joined(found), joined(truth), roundings=ROUNDINGS)


def test_no_upstream_gradient_means_none():
    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return None

    chain = gemm_chain(M=2, N=3, K=4, H=5)
    tensors = {name: t.requires_grad_() for name, t in draw(chain, torch.float32).items()}
    recorder = Recorder()
    Cut.apply(apply(chain, tensors, recorder)).sum().backward()
    assert all(tensor.grad is None for tensor in tensors.values())
    assert len(recorder.ran) == 1


def test_gradients_are_not_differentiated_again():
    chain = gemm_chain(M=2, N=3, K=4, H=5, activation="gelu")
    tensors = {name: t.requires_grad_() for name, t in draw(chain).items()}
    loss = apply(chain, tensors, execute).square().sum()
    (gradient,) = torch.autograd.grad(loss, tensors["A"], create_graph=True)
    loss.backward()  # a graph that is not used does no harm
    with pytest.raises(GradientError, match="cannot be differentiated again"):
        (loss + gradient.square().sum()).backward()


def test_inputs_that_changed_in_place_are_noticed():
    chain = gemm_chain(M=2, N=3, K=4, H=5, activation="gelu")
    tensors = {name: t.requires_grad_() for name, t in draw(chain).items()}
    output = apply(chain, tensors, execute)
    with torch.no_grad():
        tensors["B"].mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_gradients_repeat_bitwise_and_add_up():
    chain = attention(M=5, N=7, K=4, heads=4, kv_heads=2, mask="MN")
    tensors = {name: t.requires_grad_() for name, t in draw(chain, torch.float32).items()}
    apply(chain, tensors, execute).sum().backward()
    once = {name: t.grad.clone() for name, t in tensors.items()}
    apply(chain, tensors, execute).sum().backward()
    assert all(torch.equal(tensors[name].grad, 2 * gradient) for name, gradient in once.items())


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def assert_fused_gradients(chain, seed=0):
    """The output and every gradient are within twice the unfused chain's error.

    That is the worst over several orders of its sums, half of them with upstream gradients of their own, as the error
    of a few entries is luck. In fp32 the chains of the gradients, run one operation at a time, are other orders too:
    they sum rowsum(dP * P) as rowsum(dE * E), and the scores that they compute again are summed otherwise than those
    that the softmax was of.
    """
    dtype = DTYPES[chain.dtype]
    tensors = {
        name: tensor if tensor.dtype == torch.bool else (0.4 * tensor).to(dtype).double()
        for name, tensor in draw(chain).items()
    }
    truth = cache(lambda given: results(lambda t: run(chain, t), tensors, torch.float64, seed=given))
    found = results(lambda t: apply(chain, t, Interpreter(seed)), tensors, dtype, seed=0)
    assert {name: (t.shape, t.dtype) for name, t in found.items()} == {
        name: (t.shape, dtype) for name, t in truth(0).items()
    }
    errors = {name: largest_error(found[name], truth(0)[name]) for name in found}
    budgets = dict.fromkeys(found, 0.0)
    for order in range(ORDERS):
        given = order if order // 2 % 2 else 0
        unfused = results(in_another_order(_unfused(chain, order), chain, order), tensors, dtype, seed=given)
        for name, exact in truth(given).items():
            budgets[name] = max(budgets[name], allowed_error(unfused[name], exact, FUSED_FACTOR))
        if all(errors[name] <= budgets[name] for name in found):
            return
    pytest.fail(f"{chain}: errors {errors} exceed {budgets}")


def _unfused(chain, order):
    if chain.dtype == "fp32" and order % 2:
        return lambda t: apply(chain, t, InAnyOrder(order))
    return lambda t: run(chain, t)


KINDS = {
    "one product": (gemm_chain, {"K": 20}),
    "two": (gemm_chain, {"K": 20, "H": 30}),
    "two, gelu": (gemm_chain, {"K": 20, "H": 17, "batch": 2, "activation": "gelu"}),
    "three, silu": (gemm_chain, {"K": 20, "H": 30, "P": 33, "activation": "silu"}),
    "attention": (attention, {"K": 20}),
    "grouped": (attention, {"K": 20, "H": 33, "heads": 4, "kv_heads": 2, "causal": True, "diagonal": 10}),
    "masks": (attention, {"K": 16, "batch": 2, "mask": "ZMN", "keep": "ZN"}),
    "empty rows": (attention, {"K": 16, "keep": "MN", "mask": "N", "causal": True, "diagonal": -5}),
    "mlp": (mlp, {"K": 20, "H": 30, "bias": True, "residual": True}),
    "gated": (mlp, {"K": 20, "batch": 2, "gated": True, "bias": True, "activation": "silu"}),
}


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_triton_kernels(kind, dtype):
    build, options = KINDS[kind]
    assert_fused_gradients(build(M=40, N=50, dtype=dtype, **options))


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.usefixtures("interpreter")
@settings(max_examples=200)
@given(chain=chains(min_size=4, max_size=40, dtypes=DTYPES), seed=st.integers(0, 1000))
def test_gradients_of_triton_kernels_of_random_chains_and_schedules(chain, seed):
    try:
        gradients(chain, {tensor.name for tensor in chain.inputs} - chain.boolean_inputs)
    except GradientError:
        reject()
    assert_fused_gradients(chain, seed)


def test_a_checkpoint_around_a_chain_gives_the_same():
    tensors = {name: x.float().requires_grad_() for name, x in draw(attention(M=5, N=7, K=4)).items()}
    chain = attention(M=5, N=7, K=4)
    outputs = [checkpoint(apply, chain, tensors, execute, use_reentrant=False), apply(chain, tensors, execute)]
    first, second = (torch.autograd.grad(output.square().sum(), tensors.values()) for output in outputs)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
