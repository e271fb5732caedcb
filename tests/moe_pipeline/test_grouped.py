"""Grouped products against a loop of plain products: any counts, any precision, gradients written or added."""

import pytest
import torch
from closeness import assert_all_close
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from moe_pipeline.experts import GroupedLinear
from moe_pipeline.grouped import grouped_dgrad, grouped_mm, grouped_wgrad

COUNTS = st.lists(st.one_of(st.just(0), st.integers(0, 5), st.sampled_from([63, 64, 65, 130])), min_size=1, max_size=4)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
D_IN, D_OUT = 8, 5


def _tensors(counts: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(sum(counts))
    rows, experts = sum(counts), len(counts)
    shapes = [(rows, D_IN), (experts, D_OUT, D_IN), (experts, D_OUT), (rows, D_OUT)]
    rows_RI, weight_EOI, bias_EO, grad_RO = (torch.randn(shape) for shape in shapes)
    return rows_RI, weight_EOI, bias_EO, grad_RO


def _fast(tensors: list[Tensor], counts: list[int], *, bias: bool) -> dict[str, Tensor]:
    rows_RI, weight_EOI, bias_EO, grad_RO = tensors
    out_RO, grad_RI = torch.full_like(grad_RO, torch.nan), torch.full_like(rows_RI, torch.nan)
    grad_EOI, grad_EO = torch.full_like(weight_EOI, torch.nan), torch.full_like(bias_EO, torch.nan)
    grouped_mm(rows_RI, weight_EOI, bias_EO if bias else None, counts, out_RO=out_RO)
    grouped_dgrad(grad_RO, weight_EOI, counts, out_RI=grad_RI)
    grouped_wgrad(grad_RO, rows_RI, counts, weight_EOI=grad_EOI, bias_EO=grad_EO, accumulate=False)
    return {"out": out_RO, "rows": grad_RI, "weight": grad_EOI, "bias": grad_EO}


def _loop(tensors: list[Tensor], counts: list[int], *, bias: bool) -> dict[str, Tensor]:
    rows_RI, weight_EOI, bias_EO, grad_RO = tensors
    parts, grads = rows_RI.split(counts), grad_RO.split(counts)
    biases = bias_EO if bias else [None] * len(counts)
    out = [functional.linear(part, weight, b) for part, weight, b in zip(parts, weight_EOI, biases, strict=True)]
    return {
        "out": torch.cat(out),
        "rows": torch.cat([grad @ weight for grad, weight in zip(grads, weight_EOI, strict=True)]),
        "weight": torch.stack([grad.t() @ part for grad, part in zip(grads, parts, strict=True)]),
        "bias": torch.stack([grad.sum(0) for grad in grads]),
    }


@given(COUNTS, DTYPES, st.booleans())
def test_equal_a_loop_of_plain_products(counts: list[int], dtype: torch.dtype, bias: bool) -> None:
    """In bf16 on a CPU rows are padded to whole slots: experts see their rows alone, padding adds to no gradient."""
    tensors = [tensor.to(dtype) for tensor in _tensors(counts)]
    wide = [tensor.double() for tensor in tensors]
    actual = _fast(tensors, counts, bias=bias)
    assert_all_close(actual, _loop(tensors, counts, bias=bias), _loop(wide, counts, bias=bias))


@given(COUNTS, DTYPES, st.booleans())
def test_gradients_add_to_what_stands_there(counts: list[int], dtype: torch.dtype, in_float32: bool) -> None:
    """Chunks of one pass: the first writes, later ones add, in the rows' precision or in float32."""
    rows_RI, weight_EOI, bias_EO, grad_RO = (tensor.to(dtype) for tensor in _tensors(counts))
    to = torch.float32 if in_float32 else dtype
    weight, bias = torch.full_like(weight_EOI, torch.nan, dtype=to), torch.full_like(bias_EO, torch.nan, dtype=to)
    for accumulate in (False, True):
        grouped_wgrad(grad_RO, rows_RI, counts, weight_EOI=weight, bias_EO=bias, accumulate=accumulate)

    def twice(as_dtype: torch.dtype) -> dict[str, Tensor]:
        given = [tensor.to(as_dtype) for tensor in (rows_RI, weight_EOI, bias_EO, grad_RO)]
        once = _loop(given, counts, bias=True)
        return {
            name: (once[name] + once[name]).to(to if as_dtype == dtype else as_dtype) for name in ("weight", "bias")
        }

    assert_all_close({"weight": weight, "bias": bias}, twice(dtype), twice(torch.float64))


def test_only_the_gradients_that_are_asked_for_are_written() -> None:
    counts = [2, 0, 4]
    rows_RI, weight_EOI, bias_EO, grad_RO = _tensors(counts)
    both = _loop([rows_RI, weight_EOI, bias_EO, grad_RO], counts, bias=True)
    weight, bias = torch.empty_like(weight_EOI), torch.empty_like(bias_EO)
    grouped_wgrad(grad_RO, rows_RI, counts, weight_EOI=weight, bias_EO=None, accumulate=False)
    grouped_wgrad(grad_RO, rows_RI, counts, weight_EOI=None, bias_EO=bias, accumulate=False)
    assert_all_close({"weight": weight, "bias": bias}, *[{name: both[name] for name in ("weight", "bias")}] * 2)


@pytest.mark.parametrize("counts", [(1, 64, 0), (65, 63, 128), (200, 7, 3)])
def test_padding_of_slots_changes_no_result_of_a_linear_map(counts: tuple[int, ...]) -> None:
    linear = GroupedLinear(3, 8, 5).bfloat16()
    rows_RI = torch.randn(sum(counts), 8).bfloat16()
    grad_RO = torch.randn(sum(counts), 5).bfloat16()

    def run(to: torch.dtype, *, fast: bool) -> dict[str, Tensor]:
        linear.to(to).zero_grad()
        leaf_RI = rows_RI.to(to, copy=True).requires_grad_()
        parts = leaf_RI.split(counts)
        loop = [functional.linear(part, linear.weight[e], linear.bias[e]) for e, part in enumerate(parts)]  # type: ignore[index]
        out_RO = linear(leaf_RI, counts) if fast else torch.cat(loop)
        out_RO.backward(grad_RO.to(to))
        gradients = {name: parameter.grad.clone() for name, parameter in linear.named_parameters()}  # type: ignore[union-attr]
        return {"out": out_RO.detach(), "rows": leaf_RI.grad, **gradients}  # type: ignore[dict-item]

    truth = run(torch.float64, fast=False)
    assert_all_close(run(torch.bfloat16, fast=True), run(torch.bfloat16, fast=False), truth)


def test_writes_into_a_part_of_a_larger_buffer() -> None:
    rows_RI, weight_EOI, bias_EO, _ = _tensors([2, 3])
    block = torch.full((9, D_OUT), 7.0)
    grouped_mm(rows_RI, weight_EOI, bias_EO, [2, 3], out_RO=block[2:7])
    fresh = torch.empty(5, D_OUT)
    grouped_mm(rows_RI, weight_EOI, bias_EO, [2, 3], out_RO=fresh)
    assert torch.equal(block[2:7], fresh)
    assert (block[:2] == 7).all()
    assert (block[7:] == 7).all()
