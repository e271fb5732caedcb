from dataclasses import replace

import pytest
import torch

from fusion import attention, gemm_chain, mlp
from fusion.plan.partition import after_first, alone, can_be_cut, first_alone, last_alone, without_last
from fusion.reference import run

CHAINS = {
    "gemm_chain": gemm_chain(M=5, N=7, K=3, H=9, P=2, batch=2, activation="relu"),
    "attention": attention(M=5, N=7, K=3, H=4, batch=2, heads=4, kv_heads=2, mask="MN", keep="ZN", causal=True),
    "mlp": mlp(M=5, K=3, N=7, gated=True, bias=True, residual=True, activation="silu"),
}


def draw(chain):
    return {
        x.name: torch.rand(chain.shape(x.name)) < 0.8
        if x.name in chain.boolean_inputs
        else torch.randn(chain.shape(x.name), dtype=torch.float64)
        for x in chain.inputs
    }


@pytest.mark.parametrize("chain", CHAINS.values(), ids=list(CHAINS))
def test_a_product_alone_is_that_product(chain):
    for product in chain.products:
        single = alone(chain, product.out)
        assert single.products == single.stages == (product,)
        assert single.tensors[product.out] == chain.tensors[product.out]
        assert {tensor.name for tensor in single.inputs} == {product.left, product.right}
        assert single.sizes.items() <= chain.sizes.items()


@pytest.mark.parametrize("chain", CHAINS.values(), ids=list(CHAINS))
def test_the_rest_of_a_chain_goes_on_from_its_first_value(chain):
    first, tensors = chain.products[0].out, draw(chain)
    beginning = [stage for stage in chain.stages if (getattr(stage, "x", None) or stage.out) == first]
    rest = after_first(chain)
    assert len(rest.products) == len(chain.products) - 1
    assert rest.output == chain.output
    values = _value(chain, beginning, tensors)
    given = {x.name: values if x.name == first else tensors[x.name] for x in rest.inputs}
    assert torch.equal(run(rest, given), run(chain, tensors))


@pytest.mark.parametrize("chain", CHAINS.values(), ids=list(CHAINS))
def test_a_chain_cut_after_its_first_product_computes_the_same(chain):
    tensors = draw(chain)
    first, rest = first_alone(chain), after_first(chain)
    value = run(first, {x.name: tensors[x.name] for x in first.inputs})
    known = {**tensors, first.output: value}
    assert torch.equal(run(rest, {x.name: known[x.name] for x in rest.inputs}), run(chain, tensors))


def test_a_chain_can_be_cut_where_a_product_alone_reads_the_value():
    assert can_be_cut(CHAINS["gemm_chain"])
    assert not can_be_cut(CHAINS["attention"])  # all of the scores would be written
    assert not can_be_cut(CHAINS["mlp"])  # its gate is multiplied before it is rounded
    assert not can_be_cut(gemm_chain(M=5, N=7, K=3))


def _value(chain, stages, tensors):
    read = {name for stage in stages for name in (getattr(stage, k, None) for k in ("left", "right", "operand"))}
    inputs = tuple(x for x in chain.inputs if x.name in read)
    letters = {letter for x in inputs for letter in x.dims}
    part = replace(chain, dims=tuple(d for d in chain.dims if d.name in letters), inputs=inputs, stages=tuple(stages))
    return run(part, {x.name: tensors[x.name] for x in inputs})


@pytest.mark.parametrize("chain", CHAINS.values(), ids=list(CHAINS))
def test_the_last_product_goes_on_from_the_rest(chain):
    rest, last, tensors = without_last(chain), last_alone(chain), draw(chain)
    assert [product.out for product in last.products] == [chain.output]
    assert len(rest.stages) + len(last.stages) == len(chain.stages)
    values = tensors | {rest.output: run(rest, {x.name: tensors[x.name] for x in rest.inputs})}
    assert torch.equal(run(last, {x.name: values[x.name] for x in last.inputs}), run(chain, tensors))
