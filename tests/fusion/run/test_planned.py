import torch

from fusion import gemm_chain
from fusion.run import planned as module
from fusion.run.planned import planned_executor

CHAIN = gemm_chain(M=20, N=20, K=20)


def chosen(monkeypatch, device, where, interpreted="0"):
    monkeypatch.setattr(module, "cpp_executor", lambda *_: lambda *_: "C++")
    monkeypatch.setattr(module, "triton_executor", lambda *_: lambda *_: "Triton")
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    return planned_executor(device)(CHAIN, frozenset(), torch.device(where))


def test_the_device_of_the_tensors_decides(monkeypatch):
    assert chosen(monkeypatch, None, "cpu") == "C++"
    assert chosen(monkeypatch, None, "cuda") == "Triton"
    assert chosen(monkeypatch, "cpu", "cpu") == "C++"
    assert chosen(monkeypatch, "a100", "cpu") == "Triton"


def test_the_interpreter_is_asked_for_by_name(monkeypatch):
    assert chosen(monkeypatch, None, "cpu", interpreted="1") == "Triton"
