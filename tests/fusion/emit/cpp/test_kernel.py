"""Kernels of every kind, compiled a few dozen together: alone each would take a second."""

from dataclasses import replace

import pytest
import torch
from closeness import FUSED_FACTOR, assert_close
from fused_chains import any_chains, attentions, draw_tensors, mlps, schedules, to
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from native_kernels import assert_right, compiled

from fusion import attention, gemm_chain, mlp
from fusion.emit.cpp.kernel import emit
from fusion.plan import Causal, Chain, Dim, Elementwise, Input, MatMul, Softmax
from fusion.plan.cpu_model import MICRO_KERNELS
from fusion.plan.gradient import gradients
from fusion.plan.orientation import OrientationError
from fusion.plan.schedule import schedule
from fusion.reference import run
from fusion.run.check import DTYPES
from fusion.run.cpp.build import target
from fusion.run.cpp.instructions import this_machine
from fusion.run.cpp.native import compile_together

TILES = {"M": 32, "N": 48, "K": 16, "H": 32}
DEEP = {"M": 48, "N": 64, "K": 32, "H": 48}  # as a matrix unit takes them
CASES = [
    (gemm_chain(M=70, N=100, K=33, H=45, batch=2), "mn(k,h)", TILES, (6, 4)),
    (gemm_chain(M=70, N=100, K=33, H=45), "mhnk", TILES, (8, 2)),
    (gemm_chain(M=70, N=100, K=33), "mnk", {"M": 32, "N": 48, "K": 16}, (8, 3)),
    (gemm_chain(M=37, N=100, K=33, H=45, activation="gelu", dtype="bf16"), "mn(k,h)", TILES, (12, 2)),
    (attention(M=70, N=100, K=33, H=45, heads=2), "mn(k,h)", TILES | {"K": 48}, (6, 4)),
    (attention(M=70, N=70, K=33, H=45, heads=4, kv_heads=2, causal=True), "mn(k,h)", TILES | {"K": 48}, (6, 4)),
    (attention(M=70, N=100, K=33, H=45, causal=True, diagonal=30, keep="N", mask="MN"), "mn(k,h)", TILES, (6, 4)),
    (attention(M=70, N=100, K=33, H=45, causal=True, diagonal=-20, dtype="fp16"), "mn(k,h)", TILES, (8, 2)),
    (attention(M=70, N=100, K=33, H=45), "mn(k,h)", TILES | {"N": 112}, (6, 4)),
    (mlp(M=70, K=33, N=100, H=45, gated=True, bias=True, residual=True), "mn(k,h)", TILES, (6, 4)),
    (mlp(M=70, K=33, N=100, H=45, activation="gelu_tanh", dtype="bf16"), "mn(k,h)", TILES, (6, 4)),
    (gemm_chain(M=70, N=100, K=33, H=45, batch=2, dtype="bf16"), "mhnk", DEEP, (8, 2)),
    (gemm_chain(M=64, N=96, K=64, H=32, activation="silu", dtype="bf16"), "mn(k,h)", DEEP, (6, 4)),
    (attention(M=70, N=70, K=33, H=45, heads=4, kv_heads=2, causal=True, dtype="bf16"), "mn(k,h)", DEEP, (6, 4)),
    (attention(M=70, N=100, K=33, H=45, keep="N", mask="MN", dtype="bf16"), "mn(k,h)", DEEP | {"N": 112}, (6, 4)),
    (mlp(M=70, K=33, N=100, H=45, gated=True, bias=True, residual=True, dtype="bf16"), "mn(k,h)", DEEP, (6, 4)),
]  # fmt: skip


@pytest.mark.parametrize("instructions", this_machine(), ids=lambda found: found.name)
def test_kernels_are_as_right_as_unfused_chains(instructions):
    for kernel, (chain, *_) in zip(compiled(CASES, instructions), CASES, strict=True):
        assert_right(kernel, chain)


@pytest.mark.parametrize("instructions", this_machine(), ids=lambda found: found.name)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gradients_of_causal_attention_skip_what_is_masked_along_rows_and_along_columns(instructions, dtype):
    chain = attention(M=70, N=100, K=33, H=45, heads=2, causal=True, diagonal=7, dtype=dtype)
    cases = [
        (found, expression, dict.fromkeys(found.loops, 64) | dict.fromkeys("MN", tile), (6, 4))
        for found in gradients(chain, frozenset(tensor.name for tensor in chain.inputs)).chains
        for first, second in ["nm" if "N" in found.tensors[found.output] else "mn"]
        for expression in [first + _others(found, inside=True) + second + _others(found, inside=False)]
        for tile in (32, 112)
    ]
    kernels = compiled(cases, instructions)
    for kernel, (found, *_) in zip(kernels, cases, strict=True):
        assert_right(kernel, found)
    assert sum("From(" in kernel.kernel.source for kernel in kernels) == 4
    assert sum("Before(" in kernel.kernel.source for kernel in kernels) == 2


def _others(chain, *, inside):
    """Letters that are no rows or columns of scores, of those in the output or of those that are not."""
    output = chain.tensors[chain.output]
    return "".join(letter.lower() for letter in chain.loops if letter not in "MN" and (letter in output) == inside)


def test_random_chains_with_random_schedules_are_as_right():
    drawn = []

    @settings(max_examples=24, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
    @given(st.data())
    def draw(data):
        chain = data.draw(st.one_of(any_chains(), any_chains(), attentions(), mlps()))
        plan = replace(data.draw(schedules(chain)), micro=data.draw(st.sampled_from(MICRO_KERNELS)))
        try:
            drawn.append((chain, emit(chain, plan, suffix=f"_{len(drawn)}")))
        except OrientationError:
            return

    draw()
    assert len(drawn) >= 12
    for (chain, _), kernel in zip(drawn, compile_together([x for _, x in drawn], target()), strict=True):
        assert_right(kernel, chain)


def test_a_kernel_takes_all_sizes_within_its_limits():
    chain = gemm_chain(M=64, N=64, K=64, H=64)
    (kernel,) = compiled([(chain, "mn(k,h)", {"M": 16, "N": 32, "K": 64, "H": 64}, (6, 4))])
    for sizes in (
        {"M": 1, "N": 1, "K": 1, "H": 1},
        {"M": 333, "N": 77, "K": 64, "H": 5},
        {"M": 3, "N": 200, "K": 9, "H": 64},
    ):
        assert_right(kernel, gemm_chain(**sizes))
    with pytest.raises(ValueError, match="size of K is 65, above 64"):
        assert_right(kernel, gemm_chain(M=64, N=64, K=65, H=64))


def test_what_is_not_finite_comes_out_as_in_torch():
    chain = attention(M=20, N=40, K=16, keep="MN")
    (kernel,) = compiled([(chain, "mn(k,h)", {"M": 16, "N": 16, "K": 16, "H": 16}, (6, 4))])
    tensors = to(draw_tensors(chain), torch.float32)
    names = [tensor.name for tensor in chain.inputs]
    tensors[next(iter(chain.boolean_inputs))][3] = False  # a row without entries: zeros
    tensors[names[0]][5, 2], tensors[names[0]][6, 1] = float("nan"), float("inf")
    output, expected = kernel(chain, tensors)[0], run(chain, tensors)
    assert torch.equal(output.isnan(), expected.isnan())
    assert not output[3].any()


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "relu"])
def test_activations_are_right_far_from_zero_too(activation):
    chain = gemm_chain(M=64, N=64, K=1, H=16, activation=activation)
    (kernel,) = compiled([(chain, "mn(k,h)", {"M": 64, "N": 64, "K": 16, "H": 16}, (6, 4))])
    tensors = draw_tensors(chain)
    tensors["A"][:] = torch.linspace(-150, 150, 64, dtype=torch.float64)[:, None].float()
    assert_right(kernel, chain, tensors)


def test_powers_too_small_for_a_normal_number_are_zero():
    chain = attention(M=16, N=32, K=16)
    (kernel,) = compiled([(chain, "mn(k,h)", {"M": 16, "N": 32, "K": 16, "H": 16}, (6, 4))])
    tensors = {tensor.name: torch.zeros(chain.shape(tensor.name)) for tensor in chain.inputs}
    query, key, value = tensors.values()
    query[:, 0], key[:, 0] = 1.0, -4.0 * torch.arange(32)  # scores 0, -1, -2, ... and with a factor of 10 to -310
    query *= 10.0
    value[:] = 1.0
    value[0] = 0.0
    single, truth = (
        torch.softmax(a @ b.T / 4.0, 1)[:, 1:].sum(1) for a, b in ((query, key), (query.double(), key.double()))
    )
    output = kernel(chain, tensors)[0]
    assert_close("powers", output[:, 0], single, truth)
    value[:9] = 0.0  # what is left has powers below the smallest number
    assert not kernel(chain, tensors)[0].any()


def test_the_log_sum_exp_is_written_beside_the_output():
    chain = attention(M=37, N=60, K=16, heads=2, causal=True)
    for tiles in ({"M": 16, "N": 16, "K": 16, "H": 16}, {"M": 16, "N": 64, "K": 16, "H": 16}):
        (kernel,) = compiled([(chain, "mn(k,h)", tiles, (6, 4))], save_lse=True)
        tensors = draw_tensors(chain)
        query, key = (tensors[tensor.name] for tensor in chain.inputs[:2])
        scores = (query @ key.transpose(1, 2)) / 4.0
        truth = scores.masked_fill(torch.ones(37, 60).tril() == 0, -torch.inf).logsumexp(2)
        output, lse = kernel(chain, to(tensors, torch.float32))
        assert output.shape == chain.shape(chain.output)
        assert_close("lse", lse, truth.float(), truth)


def test_an_exact_output_is_the_output_before_it_is_rounded():
    chain = attention(M=37, N=60, K=16, heads=2, dtype="bf16")
    cases = [(chain, "mn(k,h)", {"M": 16, "N": 16, "K": 16, "H": 16}, (6, 4))]
    tensors = to(draw_tensors(chain), torch.bfloat16)
    (rounded, lse), (exact, same) = (compiled(cases, exact=exact, save_lse=True)[0](chain, tensors) for exact in (0, 1))
    assert (rounded.dtype, exact.dtype, same.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert torch.equal(exact.bfloat16(), rounded)
    assert not torch.equal(exact, rounded.float())
    assert torch.equal(lse, same)


def test_illegal_schedules_and_a_missing_softmax_are_refused():
    plain = gemm_chain(M=64, N=64, K=64)
    tiles = {"M": 16, "N": 16, "K": 16}
    ending = Chain(plain.dims, plain.inputs, (*plain.stages, Softmax(plain.output, "N")))
    with pytest.raises(ValueError, match="take one that"):
        emit(ending, schedule(ending, "mnk", tiles))
    with pytest.raises(ValueError, match="save_lse=True needs a chain with one softmax"):
        emit(plain, schedule(plain, "mnk", tiles), save_lse=True)


def test_a_mask_in_the_other_direction_is_right():
    dims = (Dim("M", 40), Dim("N", 52), Dim("K", 16), Dim("H", 24))
    inputs = (Input("A", "MK"), Input("B", "KN"), Input("L", "M"), Input("D", "MH"))
    stages = (
        MatMul("C", "A", "B", over="K"), Causal("C", row="N", column="M", diagonal=3),
        Elementwise("C", "exp_minus", "L"), MatMul("E", "C", "D", over="M"),
    )  # fmt: skip
    chain = Chain(dims, inputs, stages)
    (kernel,) = compiled([(chain, "nm(k,h)", {"M": 16, "N": 16, "K": 16, "H": 32}, (6, 4))])
    assert_right(kernel, chain, draw_tensors(chain))
    softmax = Chain(dims, (*inputs[:2], inputs[3]), (*stages[:2], Softmax("C", "M"), stages[3]))
    (kernel,) = compiled([(softmax, "nm(k,h)", {"M": 48, "N": 16, "K": 16, "H": 32}, (6, 4))])
    tensors = draw_tensors(softmax)
    own = to(tensors, DTYPES["fp32"])
    assert_close("softmax", kernel(softmax, own)[0], run(softmax, own), run(softmax, tensors), factor=FUSED_FACTOR)
