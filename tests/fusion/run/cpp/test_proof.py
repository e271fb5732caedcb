import pytest
import torch

from fusion import attention
from fusion.plan.schedule import schedule
from fusion.reference import run
from fusion.run.cpp.proof import ProofError, draw_tensors, prove

CHAIN = attention(M=512, N=512, K=64, heads=4, causal=True, keep="N")
PLAN = schedule(CHAIN, "mn(k,h)", {"M": 16, "N": 16, "K": 64, "H": 64})


def test_what_is_right_passes_on_sizes_that_have_edges():
    seen = []

    def right(chain, tensors):
        seen.append(chain.sizes)
        return [run(chain, tensors)]

    prove(right, CHAIN, PLAN)
    assert seen == [{"G": 2, "M": 37, "N": 37, "K": 64, "H": 64}]


@pytest.mark.parametrize("wrong", [lambda x: x * 1.001, lambda x: x + float("nan"), torch.zeros_like])
def test_what_is_wrong_does_not(wrong):
    with pytest.raises(ProofError, match="allowed are"):
        prove(lambda chain, tensors: [wrong(run(chain, tensors))], CHAIN, PLAN)


def test_tensors_are_those_of_the_chain_and_always_the_same():
    first, second = draw_tensors(CHAIN), draw_tensors(CHAIN)
    assert {name: tuple(x.shape) for name, x in first.items()} == {x.name: CHAIN.shape(x.name) for x in CHAIN.inputs}
    assert all(torch.equal(first[name], second[name]) for name in first)
