import importlib.util
import json

import pytest
import torch
from closeness import assert_all_close

from fusion import attention, gemm_chain, mlp
from fusion.plan.device import FOLDER, load_device
from fusion.plan.stages import Elementwise, MatMul
from fusion.reference import run
from fusion.run.autograd import Execution, apply
from fusion.run.cache import Cache
from fusion.run.check import DTYPES
from fusion.run.triton import executor as module
from fusion.run.triton.executor import Planner, triton_executor
from fusion.run.winner import Key
from tests.fusion.computed import results

CPU = torch.device("cpu")
SMALL = attention(M=20, N=36, K=16, heads=2, causal=True, keep="N")


def drawn(chain):
    torch.manual_seed(0)
    tensors = {}
    for tensor in chain.inputs:
        if tensor.name in chain.boolean_inputs:
            tensors[tensor.name] = torch.rand(chain.shape(tensor.name)) < 0.8
        else:
            tensors[tensor.name] = torch.randn(chain.shape(tensor.name)).to(DTYPES[chain.dtype])
    return tensors


@pytest.mark.parametrize(
    "chain",
    [
        SMALL,
        gemm_chain(M=20, N=36, K=16, H=24, batch=2, activation="gelu", dtype="fp16"),
        mlp(M=20, K=16, N=36, gated=True, activation="silu", bias=True, residual=True),
        attention(M=20, N=36, K=16, dtype="bf16"),
    ],
    ids=str,
)
def test_a_chain_runs_as_the_reference_with_its_gradients(chain, tmp_path):
    tensors = drawn(chain)
    needs = frozenset(tensors) - chain.boolean_inputs
    execution = triton_executor(cache_folder=tmp_path)(chain, needs, CPU)
    assert isinstance(execution, Execution), execution
    dtype = DTYPES[chain.dtype]
    truth = results(lambda t: run(chain, t), tensors, torch.float64)
    expected = results(lambda t: run(chain, t), tensors, dtype)
    assert_all_close(results(lambda t: apply(chain, t, execution.execute), tensors, dtype), expected, truth)


def test_what_was_chosen_is_said(tmp_path):
    execution = triton_executor("a100", tmp_path)(SMALL, frozenset(), CPU)
    assert "warps" in execution.text
    assert "with C written out; moves" in execution.text
    assert "memory-bound in fp32 on a100" in execution.text


def test_winners_are_kept_between_processes(tmp_path, monkeypatch):
    first = Planner(load_device("a100"), Cache(tmp_path))
    winner = first.winner(SMALL)
    assert Cache(tmp_path).load(Key.of(SMALL, "a100")) == winner
    monkeypatch.setattr(module, "search", None)  # nothing is searched for again
    assert Planner(load_device("a100"), Cache(tmp_path)).winner(SMALL) == winner
    with pytest.raises(TypeError):
        Planner(load_device("h100"), Cache(tmp_path)).winner(SMALL)


def test_a_chain_that_is_compute_bound_is_refused(tmp_path):
    chain = gemm_chain(M=2048, N=2048, K=2048, H=2048, dtype="fp16")
    assert str(triton_executor("a100", tmp_path)(chain, frozenset(), CPU)).startswith("compute-bound in fp16 on a100")
    assert not list(tmp_path.iterdir())


def test_a_chain_that_gains_nothing_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Planner, "fused_us", lambda self, chain: float(len(chain.products) ** 2))
    chain = gemm_chain(M=64, N=64, K=16, H=16)
    found = Planner(load_device("a100"), Cache(tmp_path)).execution(chain, frozenset())
    assert found == "predicted 4 us as one kernel, 2 us with C written out"


def test_the_time_apart_is_that_of_the_best_parts(tmp_path, monkeypatch):
    times = {1: 5.0, 2: 7.0, 3: 11.0}
    monkeypatch.setattr(Planner, "fused_us", lambda self, chain: times[len(chain.products)])
    planner = Planner(load_device("a100"), Cache(tmp_path))
    three = gemm_chain(M=64, N=64, K=16, H=16, P=16)
    assert planner.apart_us(three) == 5.0 + 7.0
    times[2] = 20.0
    assert planner.apart_us(three) == 3 * 5.0
    softmax = attention(M=64, N=64, K=16)
    assert planner.apart_us(softmax) == 2 * 5.0 + module.LEAST_US


def test_a_chain_without_gradients_is_refused_where_they_are_needed(tmp_path):
    gated = mlp(M=20, K=16, N=36, gated=True, activation="silu")
    stages = [stage for stage in gated.stages if not (isinstance(stage, MatMul) and stage.out == "E")]
    twice = type(gated)(
        gated.dims,
        gated.inputs,
        (*stages[:-1], *stages[-1:], MatMul("E", "C", "D", over="N"), Elementwise("E", "mul", 2.0)),
    )
    read_twice = type(gated)(
        twice.dims,
        twice.inputs,
        (*twice.stages, MatMul("F", "C", "D", over="N"), Elementwise("F", "add", "E")),
    )
    executor_for = triton_executor("a100", tmp_path)
    assert isinstance(executor_for(read_twice, frozenset(), CPU), Execution)
    assert "is read" in str(executor_for(read_twice, frozenset({"A"}), CPU))


def test_a_chain_that_does_not_fit_is_refused(tmp_path):
    content = json.loads((FOLDER / "a100.json").read_text())
    tiny = {**content, "name": "tiny", "shared_bytes_per_block": 64, "shared_bytes_per_sm": 64}
    (tmp_path / "tiny.json").write_text(json.dumps(tiny))
    found = triton_executor(tmp_path / "tiny.json", tmp_path)(SMALL, frozenset(), CPU)
    assert str(found).startswith("no candidate")


def test_without_a_gpu_and_the_interpreter_nothing_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    found = triton_executor("a100", tmp_path)(SMALL, frozenset(), CPU)
    assert (
        found
        == "there is no kernel for tensors on cpu: move them to a GPU, or set TRITON_INTERPRET=1 to try one slowly"
    )


def test_without_triton_nothing_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert triton_executor("a100", tmp_path)(SMALL, frozenset(), CPU) == "Triton is not installed: pip install triton"


@pytest.mark.parametrize(
    ("name", "device", "expected"),
    [
        ("NVIDIA A100-SXM4-40GB", None, "on a100"),
        ("NVIDIA GeForce RTX 3080", None, "on rtx3080"),
        ("NVIDIA H100 80GB HBM3", "a100", "on a100"),
        ("Some Other GPU", None, "Some Other GPU has no device file: pass device=, one of"),
    ],
)
def test_the_device_is_that_of_the_tensors(name, device, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    found = triton_executor(device, tmp_path)(
        gemm_chain(M=4096, N=4096, K=4096, H=4096), frozenset(), torch.device("cuda", 0)
    )
    assert expected in found
