import dataclasses
import re
import subprocess
import sys

import pytest
from hypothesis import given, reject, settings

from fusion.plan import Chain, Dim, Elementwise, Input, MatMul, Softmax, attention, gemm_chain, mlp
from fusion.plan.derived import GradientError
from fusion.plan.gradient import gradients
from fusion.plan.verify import MAX_PRODUCTS, verify
from tests.fusion.differentiable import chains

TWO = gemm_chain(M=2, N=3, K=4, H=5)
C, E = TWO.stages


def numbers(chain):
    """Names of the inputs that have gradients."""
    return {tensor.name for tensor in chain.inputs} - chain.boolean_inputs


def between(*stages, inputs=()):
    return Chain(TWO.dims, TWO.inputs + inputs, (C, *stages, E))


def test_the_plan_of_two_products():
    chain = gemm_chain(M=2, N=3, K=4, H=5, activation="gelu")
    assert str(gradients(chain, "ABD")) == (
        "dA += C[M,N] = A[M,K] B[K,N]; dC[M,N] = dE[M,H] D[N,H]; dC = gelu_grad(dC, C[M,N]); "
        "dA[M,L] = dC[M,N] B_2[L,N] | M=2 L=4 N=3 K=4 H=5 | fp32 where dE = gradient(E), B_2 = B\n"
        "dB += C[N,M] = A[M,K] B[K,N]; dC[N,M] = dE[M,H] D[N,H]; dC = gelu_grad(dC, C[N,M]); "
        "dB[L,N] = A_2[M,L] dC[N,M] | L=4 N=3 M=2 K=4 H=5 | fp32 where dE = gradient(E), A_2 = A\n"
        "dD += C[N,M] = A[M,K] B[K,N]; C = gelu(C); dD[N,H] = C[N,M] dE[M,H] "
        "| N=3 H=5 M=2 K=4 | fp32 where dE = gradient(E)"
    )


def test_the_plan_of_three_products_stores_the_middle_value():
    plan = gradients(gemm_chain(M=2, N=3, K=4, H=5, P=6, activation="relu"), "ABDF")
    assert [segment.value for segment in plan.segments] == ["E", "G"]
    first, last = plan.segments
    assert str(first.forward).startswith("C[M,N] = A[M,K] B[K,N]; C = relu(C); E[M,H] = C[M,N] D[N,H] |")
    assert (first.needs_forward, last.needs_forward) == (True, False)
    assert [str(step).split(" |")[0] for step in last.steps] == [
        "dE += dE[M,H] = dG[M,P] F[H,P]",
        "dF += dF[H,P] = E[M,H] dG[M,P]",
    ]
    assert [step.target for step in first.steps] == ["A", "B", "D"]
    text = str(plan)
    assert text.startswith("again: C[M,N]")
    assert "\nin torch: the stages of E, for E\n" in text


def test_a_middle_value_is_not_computed_where_only_its_gradient_is_read():
    plan = gradients(gemm_chain(M=2, N=3, K=4, H=5, P=6), "B")
    assert [segment.needs_forward for segment in plan.segments] == [False, False]
    assert [step.target for segment in plan.segments for step in segment.steps] == ["B", "E"]


def test_nothing_is_planned_before_a_middle_value_that_nobody_asks_for():
    plan = gradients(gemm_chain(M=2, N=3, K=4, H=5, P=6), "F")
    assert [(segment.value, segment.needs_forward) for segment in plan.segments] == [("E", True), ("G", False)]
    assert [step.target for segment in plan.segments for step in segment.steps] == ["F"]


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_attention_keeps_its_output_and_log_sum_exp(dtype):
    plan = gradients(attention(M=2, N=3, K=4, H=5, causal=True, dtype=dtype), "ABD")
    (segment,) = plan.segments
    assert (plan.saves_forward, segment.needs_lse, segment.delta_over) == (True, True, "H")
    assert str(plan).startswith("kept with log-sum-exp: C[M,N]")
    assert plan.chains == tuple(step.chain for step in segment.steps)


def test_attention_with_a_residual_runs_again_without_it():
    plain = attention(M=2, N=3, K=4, H=5)
    stages = (*plain.stages, Elementwise("E", "add", "residual"))
    chain = Chain(plain.dims, (*plain.inputs, Input("residual", "MH")), stages)
    plan = gradients(chain, "A")
    assert not plan.saves_forward
    assert plan.segments[0].forward == plain
    assert plan.chains[0] == plain
    alone = gradients(chain, ["residual"])
    assert (alone.chains, alone.segments[0].tail_needs) == ((), ("residual",))


def test_values_need_no_log_sum_exp_of_scores_that_they_do_not_read():
    assert not gradients(gemm_chain(M=2, N=3, K=4, H=5), "ABD").saves_forward
    only_values = gradients(attention(M=2, N=3, K=4), "D")
    assert (only_values.saves_forward, only_values.segments[0].delta_over) == (True, "")


@pytest.mark.parametrize(
    ("tail", "runs_again"),
    [
        ((), False),
        ((Elementwise("E", "add", "bias"), Elementwise("E", "mul", 2.0)), False),
        ((Elementwise("E", "mul", "bias"),), True),
        ((Elementwise("E", "relu"),), True),
        ((Softmax("E", over="H"),), True),
    ],
)
def test_the_output_is_computed_again_where_its_stages_depend_on_it(tail, runs_again):
    inputs = (Input("bias", "H"),) if any(isinstance(getattr(stage, "operand", None), str) for stage in tail) else ()
    plan = gradients(Chain(TWO.dims, TWO.inputs + inputs, (C, E, *tail)), "A")
    assert plan.segments[0].needs_forward is runs_again
    assert (TWO in plan.chains) is runs_again
    assert plan.segments[0].tail == tail


def test_gates_of_the_output_are_stored():
    gate = (MatMul("U", "A", "V", over="K"), Elementwise("U", "silu"))
    dims = (Dim("M", 2), Dim("N", 3), Dim("K", 4))
    inputs = (Input("A", "MK"), Input("B", "KN"), Input("V", "KN"))
    plan = gradients(Chain(dims, inputs, (*gate, C, Elementwise("C", "mul", "U"))), "AV")
    assert [(s.value, s.needs_forward, s.tail_needs) for s in plan.segments] == [("U", True, ()), ("C", True, ("U",))]
    assert [step.target for segment in plan.segments for step in segment.steps] == ["A", "V", "A"]


def test_only_what_is_asked_for_is_planned():
    chain = mlp(M=2, K=3, N=4, gated=True, bias=True, residual=True)
    for name in numbers(chain):
        plan = gradients(chain, [name])
        assert {step.target for segment in plan.segments for step in segment.steps} == {name} - {"bias_E", "residual"}
        assert plan.needs == {name}


@pytest.mark.parametrize("needs", [[], ["keep"], ["A", "C"], ["E"]])
def test_needs_are_inputs_that_have_gradients(needs):
    with pytest.raises(ValueError, match=re.escape(f"needs={sorted(needs)} must be names of inputs")):
        gradients(attention(M=2, N=3, K=4, keep="N"), needs)


def test_plans_are_values():
    chain = mlp(M=2, K=3, N=4, gated=True, bias=True)
    assert gradients(chain, ["A", "B"]) == gradients(chain, ["B", "A"])
    assert len({gradients(chain, ["A"]), gradients(chain, ["A"]), gradients(chain, ["B"])}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        gradients(chain, ["A"]).needs = frozenset()
    command = "import sys, fusion.plan.gradient; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", command], check=True)


UP = MatMul("U", "A", "V", over="K")
V = Input("V", "KN")


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        (
            Chain(
                (*TWO.dims, Dim("P", 2)),
                (*TWO.inputs, Input("F", "NP"), Input("W", "PH")),
                (C, E, MatMul("T", "C", "F", over="N"), MatMul("G", "T", "W", over="P"), Elementwise("G", "add", "E")),
            ),
            "'C' is read 2 times: end a chain with it, start others from it",
        ),
        (
            between(Elementwise("C", "exp_minus", "lse"), inputs=(Input("lse", "M"),)),
            "operation='exp_minus', operand='lse') is a gradient's stage",
        ),
        (
            between(Elementwise("C", "relu_grad", "x"), inputs=(Input("x", "MN"),)),
            "operation='relu_grad', operand='x') is a gradient's stage",
        ),
        (
            between(Softmax("C", over="N"), Elementwise("C", "relu")),
            "after the softmax of 'C' only 'mul' has a gradient as a chain, not Elementwise(x='C', operation='relu'",
        ),
        (
            between(Softmax("C", over="N"), Elementwise("C", "add", 1.0)),
            "after the softmax of 'C' only 'mul' has a gradient as a chain, not Elementwise(x='C', operation='add'",
        ),
        (
            Chain(
                (*TWO.dims, Dim("P", 2)),
                (*TWO.inputs[:2], Input("X", "NP"), Input("Y", "PH")),
                (
                    C,
                    Softmax("C", over="N"),
                    MatMul("T", "X", "Y", over="P"),
                    Softmax("T", over="N"),
                    MatMul("E", "C", "T", over="N"),
                ),
            ),
            "two softmaxes before 'E', one log-sum-exp",
        ),
        (
            between(Softmax("C", over="M")),
            "the softmax of 'C' over M must feed a product that sums over M",
        ),
        (
            between(UP, Softmax("U", over="N"), Elementwise("C", "mul", "U"), inputs=(V,)),
            "the softmax of 'U' over N must feed a product that sums over N",
        ),
        (
            Chain(
                (*TWO.dims, Dim("P", 2), Dim("Q", 2)),
                (*TWO.inputs, Input("X", "MP"), Input("Y", "PQ"), Input("V", "QN")),
                (
                    MatMul("T", "X", "Y", over="P"),
                    MatMul("U", "T", "V", over="Q"),
                    C,
                    Elementwise("C", "mul", "U"),
                    E,
                ),
            ),
            "'U' changes 'C' and is made of a value: give it a chain of its own",
        ),
        (
            between(UP, Elementwise("C", "mul", "U"), Elementwise("C", "relu"), inputs=(V,)),
            "the gradient of 'A' takes a chain of 5 products",
        ),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_what_has_no_gradient_as_chains_is_refused(chain, message):
    with pytest.raises(GradientError, match=re.escape(message)):
        gradients(chain, numbers(chain))


def test_a_refusal_is_about_what_is_asked_for():
    chain = between(Softmax("C", over="N"), Elementwise("C", "relu"))
    assert len(gradients(chain, "D").chains) == 1


@settings(max_examples=200)
@given(chain=chains())
def test_every_derived_chain_is_a_chain_that_can_be_planned(chain):
    try:
        plan = gradients(chain, numbers(chain))
    except GradientError:
        reject()
    targets = set()
    for segment in plan.segments:
        for step in segment.steps:
            verify(step.chain.dims, step.chain.inputs, step.chain.stages)
            assert [name for name, _ in step.sources] == [tensor.name for tensor in step.chain.inputs]
            assert step.chain.dtype == chain.dtype
            assert len(step.chain.products) <= MAX_PRODUCTS
            assert len(step.chain.loops) <= 6
            letters = step.chain.tensors[step.chain.output]
            own = [index for index, letter in enumerate(letters) if letter not in step.summed]
            kept = tuple(step.chain.shape(step.chain.output)[index] for index in own)
            assert kept == chain.shape(step.target)
            stored = {source.name for _, source in step.sources if source.kind == "value"}
            assert stored <= {earlier.value for earlier in plan.segments}
            targets.add(step.target)
        targets |= set(segment.tail_needs)
    assert numbers(chain) <= targets
