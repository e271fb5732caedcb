import subprocess
import sys

from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from fusion import gemm_chain
from fusion.emit.triton import emit
from fusion.plan.schedule import schedule
from fusion.run.triton.loader import kernel_folder, load

CHAIN = gemm_chain(M=16, N=16, K=16, H=16)


def kernel(**options):
    return emit(CHAIN, schedule(CHAIN, "mhnk", dict.fromkeys("MNKH", 16), **options))


def files():
    return sorted(path.name for path in kernel_folder().iterdir() if path.is_file())


def test_a_source_is_written_and_imported_once():
    first = load(kernel())
    before = files()
    assert load(kernel()) is first
    assert files() == before
    assert [name for name in before if name.endswith(".part")] == []
    assert any(name.startswith("fused_C_E_") for name in before)


def test_another_source_is_another_function():
    assert load(kernel(num_warps=8)) is not load(kernel())


def test_one_process_interprets_and_compiles(monkeypatch):
    assert isinstance(load(kernel()), InterpretedFunction)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert isinstance(load(kernel()), JITFunction)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert isinstance(load(kernel()), InterpretedFunction)


def test_a_file_that_holds_something_else_is_replaced(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = kernel(num_stages=4)
    load(made)
    (path,) = kernel_folder().glob("*.py")
    assert path.read_text() == made.source
    path.write_text("raise ValueError\n")
    monkeypatch.delenv("TRITON_INTERPRET")  # not loaded in this way yet
    load(made)
    assert path.read_text() == made.source


def test_processes_may_load_the_same_kernel_at_once(tmp_path):
    script = """
from fusion import gemm_chain
from fusion.emit.triton import emit
from fusion.plan.schedule import schedule
from fusion.run.triton.loader import load
chain = gemm_chain(M=16, N=16, K=16, H=16)
load(emit(chain, schedule(chain, "mhnk", dict.fromkeys("MNKH", 16))))
"""
    running = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
