from dataclasses import replace

import pytest
import torch
from closeness import assert_equal_up_to_rounding
from hypothesis import given, settings

from fusion import attention, gemm_chain, mlp
from fusion.plan import Elementwise
from fusion.reference import run
from fusion.run.unfused import attention_of, run_unfused
from tests.fusion.computed import draw, results
from tests.fusion.differentiable import chains

ROUNDINGS = 16 * (4 * 17 + 32)  # of sums, and of exponents of scores as large as 16


def assert_same(chain):
    """Output and gradients, in float64, where rounding hides nothing."""
    tensors = draw(chain)
    actual = results(lambda t: run_unfused(chain, t), tensors, torch.float64)
    expected = results(lambda t: run(chain, t), tensors, torch.float64)
    for name, value in expected.items():
        assert_equal_up_to_rounding(name, actual[name], value, roundings=ROUNDINGS)


@pytest.mark.parametrize(
    "chain",
    [
        attention(M=13, N=17, K=5, batch=2, heads=4, kv_heads=2, keep="ZN", causal=True),
        mlp(M=5, K=7, N=11, gated=True, bias=True, residual=True, activation="gelu_tanh"),
        gemm_chain(M=0, N=4, K=3, H=2, P=5, activation="silu"),
    ],
    ids=str,
)
def test_it_is_the_reference_with_its_gradients(chain):
    assert_same(chain)


ATTENTIONS = [
    {},
    {"batch": 2},
    {"batch": 2, "heads": 3, "H": 6},
    {"batch": 2, "heads": 4, "kv_heads": 2, "keep": "ZN"},
    {"batch": 2, "heads": 4, "kv_heads": 1, "mask": "GRMN"},
    {"heads": 2, "mask": "N", "keep": "MN"},
    {"batch": 2, "mask": "MN", "scale": -0.5},
    {"causal": True, "heads": 2},
]


@pytest.mark.parametrize("options", ATTENTIONS, ids=str)
def test_attention_is_torchs_in_any_order_of_dimensions(options):
    chain = attention(M=13, N=17, K=5, **options)
    assert_same(chain)
    turned = replace(
        chain,
        dims=tuple(sorted(chain.dims, key=lambda dim: "MHZRGNK".index(dim.name))),
        inputs=tuple(replace(tensor, dims=tensor.dims[::-1]) for tensor in chain.inputs),
        stages=(*chain.stages[:-1], replace(chain.stages[-1], left="D", right="C"), Elementwise("E", "relu")),
    )
    assert attention_of(chain) is not None
    assert attention_of(turned) is not None
    assert_same(turned)


def test_queries_without_keys_get_zeros():
    chain = attention(M=5, N=7, K=4, batch=2, keep="ZMN", mask="N")
    tensors = {name: x.float() if x.is_floating_point() else x for name, x in draw(chain).items()}
    tensors["keep"][1, 2] = False
    output = run_unfused(chain, tensors)
    assert not output[1, 2].any()
    assert output.isfinite().all()


@pytest.mark.parametrize(
    "chain",
    [
        gemm_chain(M=5, N=7, K=4, H=3),
        attention(M=5, N=7, K=4, causal=True, diagonal=2),
        attention(M=5, N=7, K=4, causal=True, keep="N"),
        attention(M=5, N=0, K=4),
    ],
    ids=str,
)
def test_what_torch_does_not_compute_at_once_goes_product_by_product(chain):
    assert attention_of(chain) is None
    assert_same(chain)


@settings(max_examples=30)
@given(chains())
def test_so_are_random_chains(chain):
    assert_same(chain)
