import pytest
import torch
from closeness import assert_close
from fused_chains import draw_tensors, to

from fusion import attention, gemm_chain, mlp
from fusion.reference import run
from fusion.run.rival import rival

CHAINS = [
    attention(M=20, N=20, K=8, heads=3, causal=True),
    attention(M=20, N=30, K=8, batch=2, heads=3),
    attention(M=20, N=30, K=8),
    attention(M=20, N=30, K=8, heads=2, causal=True, diagonal=10),
    attention(M=20, N=30, K=8, heads=2, keep="N"),
    gemm_chain(M=20, N=30, K=8, H=9, batch=2),
    mlp(M=20, K=8, N=30, gated=True, bias=True),
]


@pytest.mark.parametrize("chain", CHAINS, ids=str)
def test_torch_computes_the_chain(chain):
    tensors = draw_tensors(chain)
    own = to(tensors, torch.float32)
    assert_close(str(chain), rival(chain)(own), run(chain, own), run(chain, tensors))


def test_attention_is_one_operation_where_it_can_be():
    called = [type(rival(chain)).__name__ == "function" for chain in CHAINS]
    assert called == [True, True, True, False, False, False, False]
