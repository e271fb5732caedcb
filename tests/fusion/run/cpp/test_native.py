import threading

import pytest
import torch
from fused_chains import draw_tensors, to
from native_kernels import compiled

from fusion import attention, gemm_chain
from fusion.reference import run

CHAIN = gemm_chain(M=40, N=60, K=24, H=32, batch=3)
TILES = {"M": 16, "N": 32, "K": 32, "H": 32}


@pytest.fixture(scope="module")
def kernel():
    return compiled([(CHAIN, "mn(k,h)", TILES, (6, 4))])[0]


def test_any_strides_give_the_same_numbers(kernel):
    tensors = to(draw_tensors(CHAIN), torch.float32)
    expected = kernel(CHAIN, tensors)[0]
    strided = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in tensors.items()}
    wide = {name: torch.cat([x, x], 2)[:, :, : x.shape[2]] for name, x in tensors.items()}
    shifted = {name: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for name, x in tensors.items()}
    for given in (strided, wide, shifted):
        assert torch.equal(kernel(CHAIN, given)[0], expected)
    same = {name: x[:1].expand(x.shape) for name, x in tensors.items()}
    assert torch.equal(kernel(CHAIN, same)[0][2], expected[0])


def test_nothing_is_run_where_there_is_nothing(kernel):
    for empty in (gemm_chain(M=0, N=60, K=24, H=32, batch=3), gemm_chain(M=40, N=60, K=24, H=32, batch=0)):
        assert kernel(empty, to(draw_tensors(empty), torch.float32))[0].shape == empty.shape("E")
    no_sum = gemm_chain(M=40, N=60, K=0, H=32, batch=3)
    assert not kernel(no_sum, to(draw_tensors(no_sum), torch.float32))[0].any()


def test_threads_have_workspaces_of_their_own(kernel):
    inputs = [to(draw_tensors(CHAIN, seed=seed), torch.float32) for seed in range(4)]
    expected = [run(CHAIN, tensors) for tensors in inputs]
    found = [None] * 4

    def work(index):
        for _ in range(50):
            found[index] = kernel(CHAIN, inputs[index])[0]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(torch.equal(a, kernel(CHAIN, b)[0]) for a, b in zip(found, inputs, strict=True))
    assert all(a.shape == b.shape for a, b in zip(found, expected, strict=True))


def test_the_number_of_threads_changes_nothing(kernel):
    tensors = to(draw_tensors(CHAIN), torch.float32)
    before, one = torch.get_num_threads(), kernel(CHAIN, tensors)[0]
    try:
        torch.set_num_threads(2)
        assert torch.equal(kernel(CHAIN, tensors)[0], one)
    finally:
        torch.set_num_threads(before)


def test_wrong_tensors_are_named(kernel):
    tensors = to(draw_tensors(CHAIN), torch.float32)
    with pytest.raises(TypeError, match=r"tensors\['A'\] is torch\.float64"):
        kernel(CHAIN, tensors | {"A": tensors["A"].double()})
    with pytest.raises(ValueError, match=r"tensors\['B'\] has shape"):
        kernel(CHAIN, tensors | {"B": tensors["B"][:, 1:]})
    with pytest.raises(ValueError, match="has the names"):
        kernel(CHAIN, tensors | {"X": tensors["A"]})
    with pytest.raises(ValueError, match="on meta"):
        kernel(CHAIN, {name: x.to("meta") for name, x in tensors.items()})


def test_masks_of_any_layout_are_read():
    chain = attention(M=20, N=40, K=16, keep="NM")
    (kernel,) = compiled([(chain, "mn(k,h)", {"M": 16, "N": 16, "K": 16, "H": 16}, (6, 4))])
    tensors = to(draw_tensors(chain), torch.float32)
    (keep,) = chain.boolean_inputs
    transposed = tensors | {keep: tensors[keep].t().contiguous().t()}
    assert torch.equal(kernel(chain, tensors)[0], kernel(chain, transposed)[0])
