"""The rate of the processor's multiply-add instructions: python -m ...workers.peak <fp32|bf16|amx> <threads>.

A C++ program, compiled here for this processor, keeps as many independent sums in registers as hide the instruction's
latency, and does nothing else.
"""

import ctypes
import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from scripts.testbed.instructions import flags
from scripts.testbed.peer_processes.problem import Problem
from scripts.testbed.peer_processes.serve import DeclinedError, Loaded, serve

SOURCE = Path(__file__).with_name("peak.cpp")
ROUNDS = 100_000
COMPILE_TIMEOUT_S = 120.0

# Instructions -> flags of /proc/cpuinfo that they need, the compiler's options.
WAYS = {
    "fp32_avx512": (("avx512f",), ("-mavx512f", "-DFP32_AVX512")),
    "fp32_avx2": (("avx2", "fma"), ("-mavx2", "-mfma", "-DFP32_AVX2")),
    "bf16_avx512": (("avx512f", "avx512_bf16"), ("-mavx512f", "-mavx512bf16", "-DBF16_AVX512")),
    "bf16_amx": (("amx_tile", "amx_bf16"), ("-mamx-tile", "-mamx-bf16", "-DBF16_AMX")),
}
KINDS = {"fp32": ("fp32_avx512", "fp32_avx2"), "bf16": ("bf16_avx512",), "amx": ("bf16_amx",)}


def build(way: str, folder: Path) -> ctypes.CDLL:
    """Compile and load the program.

    Args:
        way: A name of WAYS.
        folder: Where to.
    """
    library = folder / f"{way}.so"
    options = ["-O2", "-fPIC", "-shared", "-pthread", *WAYS[way][1]]
    command = [os.environ.get("CXX", "g++"), *options, str(SOURCE), "-o", str(library)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)
    except FileNotFoundError as error:
        raise DeclinedError(f"no compiler: {command[0]} is not there; install g++ or set CXX") from error
    if done.returncode:
        raise DeclinedError(f"{' '.join(command)} failed: {done.stderr[-500:]}")
    loaded = ctypes.CDLL(str(library))
    loaded.run.restype, loaded.run.argtypes = ctypes.c_double, [ctypes.c_long, ctypes.c_int]
    return loaded


def load(kind: str, threads: int, folder: Path) -> Loaded:
    """The best instructions of a kind that the processor has.

    Args:
        kind: A name of KINDS.
        threads: Cores that compute at once.
        folder: Where to compile.
    """
    ways = [way for way in KINDS[kind] if flags().issuperset(WAYS[way][0])]
    if not ways:
        raise DeclinedError(f"the processor has none of {', '.join(KINDS[kind])}")
    library = build(ways[0], folder)
    flops = library.run(0, threads) * ROUNDS
    if flops <= 0:
        raise DeclinedError(f"the system does not let a process use {ways[0]}")
    return Loaded(run=lambda: library.run(ROUNDS, threads), outputs=list, how=ways[0], flops=flops)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        once = functools.cache(lambda: load(sys.argv[1], int(sys.argv[2]), Path(name)))

        def load_if_meant(problem: Problem) -> Loaded:
            if (problem.dtype == "fp32") != (sys.argv[1] == "fp32"):
                raise DeclinedError("the instructions of another precision")
            return once()

        serve(load_if_meant, dict)
