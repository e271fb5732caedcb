import pytest
import torch
from closeness import assert_all_close

from fusion import Chain, attention, gemm_chain, mlp
from fusion.plan import Dim, Elementwise, Input, MatMul, Softmax
from fusion.plan.device import load_device
from fusion.reference import run
from fusion.run.autograd import Execution, apply
from fusion.run.check import DTYPES
from fusion.run.cpp import executor as module
from fusion.run.cpp.build import BuildError
from fusion.run.cpp.executor import cpp_executor, measure_us, of_threads
from fusion.run.cpp.proof import ProofError
from tests.fusion.computed import results

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Kernels win whatever they take: how fast they are is no matter of tests."""
    monkeypatch.setattr(
        module, "measure_us", lambda runs, _: [1.0 + index for index, run in enumerate(runs) if run() is not runs]
    )
    monkeypatch.setattr(module, "COMPILED", 1)
    monkeypatch.setattr(module, "this_cpu", lambda: load_device("cpu"))


@pytest.mark.parametrize(
    "chain",
    [
        attention(M=40, N=56, K=16, heads=2, causal=True, keep="N"),
        mlp(M=40, K=24, N=56, gated=True, activation="silu", bias=True, residual=True),
        gemm_chain(M=40, N=56, K=24, activation="gelu"),
        attention(M=40, N=56, K=16, heads=2, dtype="bf16"),
    ],
    ids=str,
)
def test_a_chain_runs_as_the_reference_with_its_gradients(chain, tmp_path):
    tensors = module.draw_tensors(chain)
    needs = frozenset(tensors) - chain.boolean_inputs
    execution = cpp_executor(cache_folder=tmp_path)(chain, needs, CPU)
    assert isinstance(execution, Execution), execution
    dtype = DTYPES[chain.dtype]
    own = results(lambda t: apply(chain, t, execution.execute), tensors, dtype)
    expected, truth = (results(lambda t: run(chain, t), tensors, dtype) for dtype in (dtype, torch.float64))
    assert_all_close(own, expected, truth)


PROJECTED = Chain(
    dims=(Dim("Z", 3, batch=True), Dim("M", 40), Dim("K", 24), Dim("N", 16), Dim("H", 56), Dim("P", 16)),
    inputs=(Input("A", "MK"), Input("B", "ZNK"), Input("bias", "ZN"), Input("D", "ZHN"), Input("F", "ZHP")),
    stages=(
        MatMul("C", "A", "B", over="K"),
        Elementwise("C", "add", "bias"),
        MatMul("E", "C", "D", over="N"),
        Softmax("E", over="H"),
        MatMul("G", "E", "F", over="H"),
    ),
    dtype="fp32",
)  # attention, with its queries' projection


@pytest.mark.parametrize(
    "chain",
    [
        mlp(M=40, K=24, N=56, H=30, activation="gelu", bias=True, residual=True),
        mlp(M=40, K=24, N=56, H=30, activation="gelu", bias=True, residual=True, dtype="bf16"),
        PROJECTED,
    ],
    ids=str,
)
def test_a_chain_runs_in_parts_where_they_are_faster(tmp_path, monkeypatch, chain):
    monkeypatch.setattr(module.CpuPlanner, "_parts_us", lambda *_: 0.5)
    monkeypatch.setattr(module, "NEARLY", float("inf"))
    tensors = module.draw_tensors(chain)
    execution = cpp_executor(cache_folder=tmp_path)(chain, frozenset(tensors), CPU)
    assert isinstance(execution, Execution), execution
    assert ", then " in execution.text
    dtype = DTYPES[chain.dtype]
    own = results(lambda t: apply(chain, t, execution.execute), tensors, dtype)
    expected, truth = (results(lambda t: run(chain, t), tensors, kind) for kind in (dtype, torch.float64))
    assert_all_close(own, expected, truth)


def test_sizes_of_one_interval_share_their_kernels(tmp_path, monkeypatch):
    executor_for = cpp_executor(cache_folder=tmp_path)
    first = executor_for(gemm_chain(M=60, N=40, K=24), frozenset(), CPU)
    monkeypatch.setattr(module, "compile_together", None)  # nothing may be compiled any more
    assert executor_for(gemm_chain(M=55, N=45, K=30), frozenset(), CPU) == first


def test_a_winner_is_kept_for_other_processes(tmp_path, monkeypatch):
    chain = gemm_chain(M=60, N=40, K=24)
    first = cpp_executor(cache_folder=tmp_path)(chain, frozenset(), CPU)
    monkeypatch.setattr(module, "search", None)
    assert cpp_executor(cache_folder=tmp_path)(chain, frozenset(), CPU).text == first.text


def test_torch_runs_what_it_is_faster_at(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "measure_us", lambda runs, _: [3.0, 2.0][: len(runs)])
    monkeypatch.setattr(module, "NEARLY", 0.0)
    found = cpp_executor(cache_folder=tmp_path)(gemm_chain(M=60, N=40, K=24), frozenset(), CPU)
    assert found == "measured 3 us as one kernel, 2 us in torch"


def test_without_a_compiler_torch_runs_everything(tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise BuildError("there is no C++ compiler")

    monkeypatch.setattr(module, "compile_together", fail)
    executor_for = cpp_executor(cache_folder=tmp_path)
    assert executor_for(gemm_chain(M=60, N=40, K=24), frozenset(), CPU) == "there is no C++ compiler"


def test_a_kernel_that_is_wrong_is_not_used(tmp_path, monkeypatch):
    def disprove(*_):
        raise ProofError("off")

    monkeypatch.setattr(module, "prove", disprove)
    assert cpp_executor(cache_folder=tmp_path)(gemm_chain(M=60, N=40, K=24), frozenset(), CPU) == "off"


def test_tensors_elsewhere_are_refused(tmp_path):
    found = cpp_executor(cache_folder=tmp_path)(gemm_chain(M=60, N=40, K=24), frozenset(), torch.device("meta"))
    assert found == "a C++ kernel takes tensors on the CPU, not on meta"


def test_a_device_of_fewer_threads_has_its_share():
    device = load_device("cpu")
    one = of_threads(device, 1)
    assert (one.num_sms, one.fp32_flops_per_s) == (1, device.fp32_flops_per_s / 2)
    assert of_threads(device, 8).num_sms == device.num_sms


def test_measuring_runs_all_in_turns():
    order = []
    measure_us([lambda: order.append("a"), lambda: order.append("b")], 1)
    assert order[:4] == ["a", "a", "b", "b"]
    assert order.index("b") < len(order) - order[::-1].index("a")
