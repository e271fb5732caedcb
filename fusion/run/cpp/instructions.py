"""The instruction set of this CPU, out of those that kernels are written for.

Source: not in the paper, whose kernels are for GPUs.
"""

import ctypes
import functools
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

AVX2 = ("avx2", "fma", "f16c")
AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq", *AVX2)
AMX = ("amx_tile", "amx_bf16", "avx512_bf16", *AVX512)
NEEDED = (("amx", AMX), ("avx512", AVX512), ("avx2", AVX2))  # the best first: what a CPU must say that it has
ASK_FOR_UNIT = (158, 0x1023, 18)  # Linux lends a process the matrix unit's registers: arch_prctl, request, tile data
MACHINES = ("x86_64", "AMD64")


@dataclass(frozen=True)
class InstructionSet:
    """What kernels are compiled for.

    Source: not in the paper.
    """

    name: str
    """One of `amx`, `avx512`, `avx2` and `plain`; plain kernels run on any CPU of this architecture."""
    flags: tuple[str, ...]
    """For the compiler."""


def instruction_sets(features: frozenset[str], machine: str) -> list[InstructionSet]:
    """Those that a CPU has, the best first.

    Args:
        features: What the CPU says that it has, by the names of Linux.
        machine: Its architecture, as `platform.machine` names it.

    Source: not in the paper.
    """
    found = [
        InstructionSet(name, tuple(f"-m{feature.replace('512_', '512').replace('_', '-')}" for feature in needed))
        for name, needed in NEEDED
        if machine in MACHINES and features.issuperset(needed)
    ]
    return [*found, InstructionSet("plain", ())]


@functools.cache
def this_machine() -> tuple[InstructionSet, ...]:
    """Those of this CPU, the best first; asked each process anew, so that a cache folder may be shared.

    The matrix unit is among them if the system lends it to this process, and is then lent.

    Source: not in the paper.
    """
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    flags = next((line.partition(":")[2] for line in text.splitlines() if line.startswith("flags")), "")
    found = instruction_sets(frozenset(flags.split()), platform.machine())
    return tuple(each for each in found if each.name != "amx" or _unit_is_lent())


def _unit_is_lent() -> bool:
    return sys.platform == "linux" and ctypes.CDLL(None).syscall(*ASK_FOR_UNIT) == 0
