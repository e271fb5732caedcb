"""Which instructions torch's libraries take on this machine, as they say themselves, and what the processor has."""

import subprocess
import sys
from pathlib import Path

TIMEOUT_S = 120.0
VECTOR_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "sve", "asimd")
PRODUCTS = "import torch; x = torch.ones(64, 64); x @ x; y = x.bfloat16(); y @ y"


def instructions() -> dict[str, str]:
    """MKL's and oneDNN's instruction sets, by their verbose output for one product each, and the processor's flags.

    Returns:
        Name -> text without spaces, as a row's versions take it; `unknown` where a library says nothing.
    """
    done = subprocess.run(
        [sys.executable, "-c", PRODUCTS],
        env={"PATH": "/usr/bin:/bin", "MKL_VERBOSE": "1", "ONEDNN_VERBOSE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    lines = done.stdout.splitlines()
    mkl = next((line.split("architecture", 1)[1].split(", Lnx")[0] for line in lines if "architecture" in line), "")
    onednn = next((line.split("isa:", 1)[1] for line in lines if ",isa:" in line), "")
    found = {
        "mkl_isa": mkl,
        "onednn_isa": onednn,
        "cpu_flags": " ".join(flag for flag in VECTOR_FLAGS if flag in flags()),
    }
    return {name: "_".join(text.replace(",", " ").split()) or "unknown" for name, text in found.items()}


def flags() -> frozenset[str]:
    """What /proc/cpuinfo says of the first processor; nothing elsewhere than on Linux."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = next((line.split(":", 1)[1] for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(named.split())
