import pytest
import torch

from fusion import attention
from fusion.run.check import check_tensors

CHAIN = attention(M=2, N=3, K=4, keep="N", dtype="fp16")


def tensors(dtype):
    floats = {name: torch.zeros(CHAIN.shape(name), dtype=dtype) for name in "ABD"}
    return floats | {"keep": torch.ones(3, dtype=torch.bool)}


def test_the_chains_own_dtype_is_accepted():
    check_tensors(CHAIN, tensors(torch.float16), float64=False)


def test_float64_is_accepted_where_it_is_asked_for():
    check_tensors(CHAIN, tensors(torch.float64), float64=True)
    with pytest.raises(TypeError, match=r"tensors\['A'\] is torch.float64, not torch.float16; .* as torch.float16$"):
        check_tensors(CHAIN, tensors(torch.float64), float64=False)


@pytest.mark.parametrize("float64", [False, True])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"extra": torch.zeros(1)}, ValueError, "extra"),
        ({"A": [[0.0]]}, TypeError, r"tensors\['A'\] is a list; pass a torch.Tensor"),
        ({"B": torch.zeros(4, 3).half()}, ValueError, r"tensors\['B'\] has shape \(4, 3\); B\[N,K\] is \(3, 4\) here"),
        ({"B": torch.zeros(3, 4)}, TypeError, r"tensors\['B'\] is torch.float32, not torch.float16"),
        ({"keep": torch.zeros(3).half()}, TypeError, r"tensors\['keep'\] is torch.float16, not torch.bool"),
        ({"B": torch.zeros(3, 4, device="meta").half()}, ValueError, r"tensors\['B'\] is on meta, 'A' on cpu"),
    ],
)
def test_wrong_tensors_are_refused_by_name(change, error, message, float64):
    with pytest.raises(error, match=message):
        check_tensors(CHAIN, tensors(torch.float16) | change, float64=float64)
