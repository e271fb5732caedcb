"""The section of experiments with fused kernels: which chains, on which devices, how they are searched."""

from dataclasses import dataclass

from configs.typed import at_least


@dataclass(frozen=True, kw_only=True)
class ChainSizes:
    """Sizes of a chain of two products, E = (A B) D."""

    M: int = 1024
    """Rows."""
    N: int = 1024
    """Columns of A B."""
    K: int = 512
    """Length of the first sum."""
    H: int = 512
    """Columns of the output."""

    def __post_init__(self) -> None:
        at_least(self, 1, "M", "N", "K", "H")


@dataclass(frozen=True, kw_only=True)
class KernelsSection:
    """A search for kernels."""

    chain: ChainSizes = ChainSizes()
    """The chain of experiments that look at one alone."""
    shapes: tuple[str, ...] = ()
    """Names of the chains of the others, as in scripts/testbed/benchmarks/fusion_shapes.py; empty takes all."""
    devices: tuple[str, ...] = ("a100", "rtx3080", "h100", "mi300")
    """Names or paths of device files."""
    population: int = 512
    """Candidates of a round: the paper's N."""
    top: int = 8
    """Candidates of a round that are measured: the paper's n."""
    num_compiled: int = 480
    """Candidates that are compiled to compare the estimate of shared memory with."""

    def __post_init__(self) -> None:
        at_least(self, 1, "population", "top", "num_compiled")
        if not self.devices:
            raise ValueError("devices: got [], accepts at least one name or path of a device file")
