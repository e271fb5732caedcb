"""The section of experiments that time fused kernels on a CPU beside other libraries."""

from dataclasses import dataclass
from typing import Literal

from configs.typed import at_least


@dataclass(frozen=True, kw_only=True)
class CPUSection:
    """What is computed, and by which libraries."""

    peers: tuple[str, ...] = ()
    """Names of scripts/testbed/peer_processes/roster.py; empty takes all. Those with packages of their own are
    installed into the cache folder when they are first asked for."""
    shapes: tuple[str, ...] = ()
    """Sizes, as scripts/testbed/benchmarks/cpu_shapes.py writes them; empty takes all of the experiment's."""
    num_shapes: int | None = None
    """Of these only so many, the first; null takes all."""
    dtypes: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    """Precisions."""
    sample_ms: float = 10.0
    """Milliseconds over which short calls are repeated in a round."""
    compiled: int | None = None
    """Candidates of each of our searches that are compiled and measured; null is the library's number."""
    candidates: int = 40
    """Kernels drawn from all of the space, to compare with the model and with the search's winner."""
    tvm_chains: int = 2
    """Of the chains, so many are searched by TVM's MetaSchedule, too, which is installed for that; 0 does without."""
    tvm_budget: float = 80.0
    """Its time for a search, in times of ours."""

    def __post_init__(self) -> None:
        at_least(self, 0, "sample_ms", "tvm_chains")
        at_least(self, 1, "num_shapes", "compiled")
        at_least(self, 2, "candidates")
        at_least(self, 10, "tvm_budget")
        if not self.dtypes:
            raise ValueError("dtypes: got [], accepts at least one of fp32 and bf16")
