"""What peers compute: a chain of two products or attention, with inputs that every process draws alike.

Nothing but numpy is imported here: the environments of peers have little else in common.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
DType = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """E = (A B) D, or E = softmax(A B' / sqrt(K)) D; with `backward` the gradients of A, B and D, too."""

    kind: Literal["chain", "attention"]
    batch: int
    """Products that are computed independently: heads, in attention."""
    M: int
    N: int
    K: int
    H: int
    dtype: DType = "fp32"
    """Of inputs and outputs."""
    causal: bool = False
    """Whether row i of attention sees columns up to i alone."""
    backward: bool = False
    seed: int = 0
    """Of the inputs."""

    @property
    def flops(self) -> int:
        """Of the products, as far as they are needed: a causal mask halves them, a backward adds five to the two."""
        entries = sum(min(row + 1, self.N) for row in range(self.M)) if self.causal else self.M * self.N
        if self.backward:  # C again, its gradient; gradients of A, B and D
            return 2 * self.batch * entries * (4 * self.K + 3 * self.H)
        return 2 * self.batch * entries * (self.K + self.H)

    @property
    def scale(self) -> float:
        """What the scores of attention are multiplied by."""
        return self.K**-0.5

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every input, and of the output E; a chain without a batch has matrices."""
        B = (self.N, self.K) if self.kind == "attention" else (self.K, self.N)
        matrices = {"A": (self.M, self.K), "B": B, "D": (self.N, self.H), "E": (self.M, self.H)}
        lead = (self.batch,) if self.batch > 1 or self.kind == "attention" else ()
        return {name: (*lead, *shape) for name, shape in matrices.items()}

    def inputs(self) -> dict[str, Array]:
        """Inputs A, B, D, and for a backward the output's gradient E, in fp32 with values that the dtype holds."""
        generator = np.random.default_rng(self.seed)
        chosen = [name for name in self.shapes() if name != "E" or self.backward]
        drawn = {name: generator.standard_normal(self.shapes()[name], np.float32) for name in chosen}
        if self.kind == "chain":  # so that all values are about 1
            drawn["B"] *= np.float32(self.K**-0.5)
            drawn["D"] *= np.float32(self.N**-0.5)
        return drawn if self.dtype == "fp32" else {name: rounded_to_bf16(x) for name, x in drawn.items()}

    def to_json(self) -> dict[str, Any]:
        """The fields."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        sizes = ",".join(str(size) for size in (self.batch, self.M, self.N, self.K, self.H))
        marks = " causal" * self.causal + " with gradients" * self.backward
        return f"{self.kind} {sizes} {self.dtype}{marks}"


def rounded_to_bf16(x: Array) -> Array:
    """The nearest values with eight significant bits, ties to even.

    Args:
        x: Finite.
    """
    bits = x.view(np.uint32)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    return (rounded & np.uint32(0xFFFF0000)).view(np.float32)
