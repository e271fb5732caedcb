import types

import pytest
import torch
from closeness import assert_equal_up_to_rounding
from fused_chains import ACTIVATIONS, GRADIENTS

from fusion import gemm_chain
from fusion.emit.arithmetic import causal, elementwise, keeps_zeros
from fusion.plan import Causal, Chain, Dim, Elementwise, Input, MatMul, Softmax
from fusion.reference import run

TL = types.SimpleNamespace(
    where=lambda seen, a, b: torch.where(seen, torch.as_tensor(a).double(), torch.as_tensor(b).double()),
    exp=torch.exp,
    erf=torch.erf,
)
FP32_IN_FP64 = 2**30  # roundings of fp64 that are two of fp32


def execute(lines, **variables):
    """What lines of a kernel do to `x`, in float64."""
    exec("\n".join(lines), {"tl": TL}, variables)
    return variables["x"]


def meaning(operation, x, y):
    """The same by the reference: a product with the identity leaves x as it is."""
    read = operation not in ACTIVATIONS
    dims = tuple(Dim(letter, size) for letter, size in zip("MNK", (*x.shape, len(x)), strict=True))
    inputs = (Input("A", "MK"), Input("B", "KN"), *((Input("y", "MN"),) if read else ()))
    stages = [MatMul("C", "A", "B", over="K"), Elementwise("C", operation, "y" if read else None)]
    if operation == "mask":
        stages.append(Softmax("C", "N"))
    tensors = {"A": torch.eye(len(x), dtype=torch.float64), "B": x} | ({"y": y} if read else {})
    return run(Chain(dims, inputs, tuple(stages)), tensors)


@pytest.mark.parametrize("operation", [*ACTIVATIONS[1:], *GRADIENTS, "add", "mul", "exp_minus"])
def test_lines_mean_what_the_reference_does(operation):
    x, y = torch.randn(20, 30, dtype=torch.float64) * 3, torch.randn(20, 30, dtype=torch.float64) * 3
    y[3, :4] = -torch.inf if operation == "exp_minus" else 0.0
    result = execute(elementwise(operation, "x", "y"), x=x, y=y)
    assert_equal_up_to_rounding(operation, result, meaning(operation, x, y), roundings=32)


@pytest.mark.parametrize("operation", [*ACTIVATIONS[1:], *GRADIENTS])
def test_far_out_nothing_overflows(operation):
    far = torch.tensor([[-1e4, -200.0, -30.0, 30.0, 200.0, 1e4]], dtype=torch.float32)
    one = torch.ones_like(far)
    x, y = (far, one) if operation in ACTIVATIONS else (one, far)
    result = execute(elementwise(operation, "x", "y"), x=x, y=y).double()
    assert torch.isfinite(result).all()
    assert_equal_up_to_rounding(operation, result, meaning(operation, x.double(), y.double()), roundings=FP32_IN_FP64)


def test_masks_leave_minus_infinity():
    x = torch.randn(3, 4, dtype=torch.float64)
    seen = torch.rand(3, 4) < 0.5
    assert torch.equal(execute(elementwise("mask", "x", "y"), x=x, y=seen), x.masked_fill(~seen, -torch.inf))
    for diagonal in (-1, 0, 2):
        line = causal(Causal("C", "M", "N", diagonal), "x", "rows", "columns")
        result = execute([line], x=x, rows=torch.arange(3)[:, None], columns=torch.arange(4)[None, :])
        expected = x.masked_fill(~torch.ones(3, 4, dtype=torch.bool).tril(diagonal), -torch.inf)
        assert torch.equal(result, expected)


@pytest.mark.parametrize(
    ("stages", "zero"),
    [
        ((), "MN"),
        ((Elementwise("C", "mul", 2.0), Elementwise("C", "gelu"), Elementwise("C", "silu_grad", "row")), "MN"),
        ((Elementwise("C", "add", 2.0),), ""),
        ((Elementwise("C", "add", "row"),), "M"),
        ((Elementwise("C", "exp_minus", "row"),), ""),
        ((Softmax("C", "N"),), "N"),
        ((Elementwise("C", "add", 2.0), Softmax("C", "N")), "N"),
        ((Softmax("C", "N"), Elementwise("C", "mul", "row")), "N"),
        ((Softmax("C", "N"), Elementwise("C", "add", "row")), ""),
        ((Causal("C", "M", "N"), Softmax("C", "M")), "M"),
    ],
    ids=str,
)
def test_which_stages_keep_what_is_outside_zero(stages, zero):
    chain = gemm_chain(M=3, N=4, K=5, H=6)
    first, second = chain.products
    reads = any(getattr(stage, "operand", None) == "row" for stage in stages)
    inputs = (*chain.inputs, *((Input("row", "M"),) if reads else ()))
    chain = Chain(chain.dims, inputs, (first, *stages, second))
    assert "".join(letter for letter in "MN" if keeps_zeros(chain, "C", letter)) == zero
