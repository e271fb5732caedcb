import pytest
import torch
from closeness import assert_close, assert_equal_up_to_rounding

from fusion.plan import Causal, Chain, Dim, Elementwise, Input, MatMul, Softmax
from fusion.reference import run
from fusion.run.tail import finish, gradients_of_finish

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DIMS = (Dim("Z", 2, batch=True), Dim("M", 5), Dim("N", 7), Dim("K", 1))
SHIFT, GATE, KEEP = Input("shift", "ZN"), Input("gate", "NM"), Input("keep", "NZ")
TAILS = {
    "nothing": (),
    "numbers": (Elementwise("C", "add", 0.5), Elementwise("C", "mul", -2.0)),
    "tensors": (Elementwise("C", "mul", "gate"), Elementwise("C", "add", "shift")),
    **{f"{name}": (Elementwise("C", name), Elementwise("C", "mul", "gate")) for name in ("relu", "gelu", "silu")},
    "gelu_tanh": (Elementwise("C", "gelu_tanh"),),
    "softmax": (Elementwise("C", "mul", "gate"), Softmax("C", over="M"), Elementwise("C", "mul", 3.0)),
    "masks": (
        Causal("C", row="N", column="M", diagonal=-1),
        Elementwise("C", "mask", "keep"),
        Elementwise("C", "add", "shift"),
        Softmax("C", over="N"),
    ),
}


def example(tail, dtype):
    """A chain that multiplies by one, so that its value is exact, with its tensors in float64, and the value."""
    read = {stage.operand for stage in tail if isinstance(stage, Elementwise)}
    extras = tuple(x for x in (SHIFT, GATE, KEEP) if x.name in read)
    chain = Chain(DIMS, (Input("A", "ZMK"), Input("B", "KN"), *extras), (MatMul("C", "A", "B", over="K"), *tail), dtype)
    tensors = {x.name: torch.randn(chain.shape(x.name)).to(DTYPES[dtype]).double() for x in chain.inputs}
    tensors["A"] = tensors["A"].sign()
    tensors["keep"] = torch.rand(chain.shape("keep")) < 0.6 if KEEP in extras else None
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return chain, tensors, torch.einsum("zmk,kn->zmn", tensors["A"], tensors["B"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tail", TAILS)
def test_it_is_what_the_reference_does(tail, dtype):
    chain, tensors, value = example(TAILS[tail], dtype)
    truth = run(chain, tensors)
    found = finish(chain, TAILS[tail], value, tensors)
    assert_equal_up_to_rounding("in float64", found, truth, roundings=8)
    rounded = {name: x if x.dtype == torch.bool else x.to(DTYPES[dtype]) for name, x in tensors.items()}
    found = finish(chain, TAILS[tail], value.to(DTYPES[dtype]), rounded)
    assert_close("in the chain's dtype", found, run(chain, rounded), truth)


@pytest.mark.parametrize("tail", TAILS)
def test_gradients_are_the_references(tail):
    chain, tensors, value = example(TAILS[tail], "fp32")
    upstream = torch.randn_like(value)
    leaves = {name: x.clone().requires_grad_(x.dtype != torch.bool) for name, x in tensors.items()}
    run(chain, leaves).backward(upstream)
    wanted = [name for name in ("shift", "gate") if name in tensors]
    own, others = gradients_of_finish(chain, TAILS[tail], value, tensors, upstream, wanted)
    through_product = torch.einsum("zmn,kn->zmk", own, tensors["B"])
    assert_equal_up_to_rounding("value", through_product, leaves["A"].grad, roundings=7 * 8)
    assert list(others) == wanted
    for name in wanted:
        assert_equal_up_to_rounding(name, others[name], leaves[name].grad, roundings=7 * 8)


def test_what_only_adds_and_scales_needs_no_value():
    chain, tensors, value = example((Elementwise("C", "add", "shift"), Elementwise("C", "mul", 2.0)), "fp32")
    upstream = torch.randn_like(value)
    anything = torch.zeros((), dtype=torch.float64).expand(value.shape)
    own, others = gradients_of_finish(chain, chain.epilogue("C"), anything, tensors, upstream, ["shift"])
    assert torch.equal(own, 2 * upstream)
    assert_equal_up_to_rounding("shift", others["shift"], 2 * upstream.sum(1), roundings=5)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_nothing_is_rounded_between_stages(dtype):
    chain, tensors, value = example((Elementwise("C", "add", 4096.0), Elementwise("C", "add", -4096.0)), dtype)
    value = value.sign().to(DTYPES[dtype])
    assert torch.equal(finish(chain, chain.epilogue("C"), value, tensors), value)


def test_operands_are_left_as_they_were():
    chain, tensors, value = example(TAILS["tensors"], "fp32")
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    gradients_of_finish(chain, TAILS["tensors"], value, tensors, torch.ones_like(value), ["gate"])
    assert all(torch.equal(tensors[name], copies[name]) for name in copies)
    assert not any(tensor.requires_grad for tensor in (value, *tensors.values()))
