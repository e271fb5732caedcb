import pytest
import torch
from closeness import FUSED_FACTOR, assert_close
from fused_chains import draw_tensors, to

from fusion import attention, gemm_chain
from fusion.emit.triton import emit
from fusion.plan.schedule import schedule
from fusion.reference import run
from fusion.run.triton.launch import _check_strides, launch, launch_with_lse

CHAIN = gemm_chain(M=20, N=16, K=16, H=24)
KERNEL = emit(CHAIN, schedule(CHAIN, "mhnk", dict.fromkeys("MNKH", 16)))


def test_a_kernel_computes_its_chain_and_leaves_its_inputs_alone():
    truth = draw_tensors(CHAIN)
    tensors = to(truth, torch.float32)
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    output = launch(KERNEL, CHAIN, tensors)
    assert_close("output", output, run(CHAIN, copies), run(CHAIN, truth), factor=FUSED_FACTOR)
    assert all(torch.equal(tensors[name], copies[name]) for name in copies)


def test_launches_repeat_bitwise():
    tensors = to(draw_tensors(CHAIN), torch.float32)
    assert torch.equal(launch(KERNEL, CHAIN, tensors), launch(KERNEL, CHAIN, tensors))


def test_without_a_gpu_or_the_interpreter_an_error_says_what_to_do(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    message = r"tensors are on cpu, where Triton has no compiler; .* TRITON_INTERPRET=1"
    with pytest.raises(RuntimeError, match=message):
        launch(KERNEL, CHAIN, to(draw_tensors(CHAIN), torch.float32))


def test_wrong_tensors_are_refused():
    with pytest.raises(TypeError, match=r"tensors\['A'\] is torch.float64, not torch.float32"):
        launch(KERNEL, CHAIN, draw_tensors(CHAIN))


@pytest.mark.parametrize("size", [0, 3])
def test_an_output_may_be_empty(size):
    chain = attention(M=size, N=5, K=4, batch=3 - size)
    kernel = emit(chain, schedule(chain, "mhnk", dict.fromkeys("MNKH", 16)), save_lse=True)
    output, lse = launch_with_lse(kernel, chain, to(draw_tensors(chain), torch.float32))
    assert output.shape == (3 - size, size, 4)
    assert lse.shape == (3 - size, size)


def test_a_stride_that_leaves_32_bits_inside_a_tile_is_refused():
    tensors = [torch.empty(chain_shape, device="meta") for chain_shape in ((20, 16), (16, 16), (16, 24), (20, 24))]
    _check_strides(KERNEL, tensors)
    tensors[1] = torch.empty_strided((16, 16), (2**28, 1), device="meta")
    with pytest.raises(ValueError, match=r"tensors\['B'\] has a stride of 268435456 along K"):
        _check_strides(KERNEL, tensors)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_compiled_kernels_are_as_right_as_interpreted_ones(dtype, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    chain = attention(M=100, N=130, K=64, batch=2, heads=4, kv_heads=2, causal=True, diagonal=30, dtype=dtype)
    kernel = emit(chain, schedule(chain, "mhnk", {"M": 32, "N": 32, "K": 64, "H": 64}))
    truth = {name: tensor.cuda() for name, tensor in draw_tensors(chain).items()}
    tensors = to(truth, {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype])
    output = launch(kernel, chain, tensors)
    assert_close("output", output, run(chain, tensors), run(chain, truth), factor=FUSED_FACTOR)
