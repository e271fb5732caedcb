"""The instruction set of this CPU, out of those that kernels are written for.

Source: not in the paper, whose kernels are for GPUs.
"""

import functools
import platform
from dataclasses import dataclass
from pathlib import Path

NEEDED = (  # the widest first: what a CPU must say that it has, and what a compiler is told
    ("avx512", ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx2", "fma", "f16c")),
    ("avx2", ("avx2", "fma", "f16c")),
)
MACHINES = ("x86_64", "AMD64")


@dataclass(frozen=True)
class InstructionSet:
    """What kernels are compiled for.

    Source: not in the paper.
    """

    name: str
    """One of `avx512`, `avx2` and `plain`; plain kernels run on any CPU of this architecture."""
    flags: tuple[str, ...]
    """For the compiler."""


def instruction_sets(features: frozenset[str], machine: str) -> list[InstructionSet]:
    """Those that a CPU has, the widest first.

    Args:
        features: What the CPU says that it has, by the names of Linux.
        machine: Its architecture, as `platform.machine` names it.

    Source: not in the paper.
    """
    found = [
        InstructionSet(name, tuple(f"-m{feature}" for feature in needed))
        for name, needed in NEEDED
        if machine in MACHINES and features.issuperset(needed)
    ]
    return [*found, InstructionSet("plain", ())]


@functools.cache
def this_machine() -> tuple[InstructionSet, ...]:
    """Those of this CPU, the widest first; asked each process anew, so that a cache folder may be shared.

    Source: not in the paper.
    """
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    flags = next((line.partition(":")[2] for line in text.splitlines() if line.startswith("flags")), "")
    return tuple(instruction_sets(frozenset(flags.split()), platform.machine()))
