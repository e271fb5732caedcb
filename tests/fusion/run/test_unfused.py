import pytest
import torch
from closeness import assert_equal_up_to_rounding
from hypothesis import given, settings

from fusion import attention, gemm_chain, mlp
from fusion.reference import run
from fusion.run.unfused import run_unfused
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


@settings(max_examples=30)
@given(chains())
def test_so_are_random_chains(chain):
    assert_same(chain)
