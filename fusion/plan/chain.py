"""A chain of matrix products as a value: what to compute, nothing about how.

What a search and an emitter ask of it are properties: the loops, the letters that index each tensor, what each product
sums over, what stands between the products, and the traffic with and without fusion.
"""

import functools
import math
from dataclasses import dataclass
from typing import Literal, get_args

from fusion.plan.stages import Causal, Dim, Elementwise, Input, MatMul, Softmax, Stage, operands, product_dims
from fusion.plan.verify import verify

DType = Literal["fp32", "fp16", "bf16"]


@dataclass(frozen=True)
class Chain:
    """Dimensions, inputs, and stages in the order they run; the last product's value is the output.

    Raises:
        TypeError: A field or a size has the wrong type.
        ValueError: A part is inconsistent; the message names the dimension, input or stage, and its argument.

    Source: MCFuser (arXiv:2506.22169), Figure 3; the stages between its products are not in the paper.
    """

    dims: tuple[Dim, ...]
    inputs: tuple[Input, ...]
    stages: tuple[Stage, ...]
    dtype: DType = "fp32"

    def __post_init__(self) -> None:
        verify(self.dims, self.inputs, self.stages)
        if self.dtype not in get_args(DType):
            raise ValueError(f"dtype={self.dtype!r} must be one of {get_args(DType)}")

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[type["Chain"], tuple[object, ...]]:
        """What was found once stays here: another process hashes text in another way."""
        return Chain, (self.dims, self.inputs, self.stages, self.dtype)

    @functools.cached_property
    def _hash(self) -> int:
        """Found once: a chain is the key of whatever is kept for it, and those are asked at every call."""
        return hash((self.dims, self.inputs, self.stages, self.dtype))

    @property
    def sizes(self) -> dict[str, int]:
        """Letter -> size, in the chain's order."""
        return {dim.name: dim.size for dim in self.dims}

    @property
    def batch(self) -> str:
        """Letters along which the chain is repeated independently."""
        return "".join(dim.name for dim in self.dims if dim.batch)

    @property
    def loops(self) -> str:
        """Letters that are tiled: the paper's cross-tile loops."""
        return "".join(dim.name for dim in self.dims if not dim.batch)

    @property
    def products(self) -> tuple[MatMul, ...]:
        """The matrix products, in order."""
        return tuple(stage for stage in self.stages if isinstance(stage, MatMul))

    @property
    def tensors(self) -> dict[str, str]:
        """Name -> letters that index it: the inputs, then every product's value."""
        return dict(self._tensors)

    @functools.cached_property
    def _tensors(self) -> dict[str, str]:
        """Found once: whoever runs a chain asks at every call."""
        tensors = {tensor.name: tensor.dims for tensor in self.inputs}
        for product in self.products:
            tensors[product.out] = product_dims(product, tensors, "".join(self.sizes))
        return tensors

    @property
    def output(self) -> str:
        """Name of the result."""
        return self.products[-1].out

    @property
    def intermediates(self) -> tuple[str, ...]:
        """Names of the values that fusion keeps on chip."""
        return tuple(product.out for product in self.products[:-1])

    @property
    def boolean_inputs(self) -> frozenset[str]:
        """Names of the inputs that are boolean masks; all other tensors are of the chain's dtype."""
        masks = (s.operand for s in self.stages if isinstance(s, Elementwise) and s.operation == "mask")
        return frozenset(str(name) for name in masks)

    def epilogue(self, value: str) -> tuple[Elementwise | Causal | Softmax, ...]:
        """The stages that change a product's value in place, in order; they need its sum complete."""
        return tuple(stage for stage in self.stages if not isinstance(stage, MatMul) and stage.x == value)

    def is_linear(self, value: str) -> bool:
        """Whether a product's value is only scaled, so that its partial sums may feed the next product already."""
        return all(
            isinstance(stage, Elementwise) and stage.operation == "mul" and isinstance(stage.operand, float)
            for stage in self.epilogue(value)
        )

    def softmax_over(self, value: str) -> str:
        """Letters that a value's softmax runs over, or none: to split such a loop takes a running maximum and sum."""
        return "".join(stage.over for stage in self.epilogue(value) if isinstance(stage, Softmax))

    def shape(self, name: str) -> tuple[int, ...]:
        """Sizes of a tensor's dimensions."""
        sizes = self.sizes
        return tuple(sizes[letter] for letter in self.tensors[name])

    @property
    def item_bytes(self) -> int:
        """Bytes of an entry of every tensor but the boolean inputs."""
        return 4 if self.dtype == "fp32" else 2

    def num_bytes(self, name: str) -> int:
        """Bytes of a tensor written out in full."""
        return math.prod(self.shape(name)) * (1 if name in self.boolean_inputs else self.item_bytes)

    @property
    def flops(self) -> int:
        """Multiplications and additions of the products, masked entries included; other stages are not counted."""
        sizes = self.sizes
        return sum(2 * math.prod(self.shape(product.out)) * sizes[product.over] for product in self.products)

    @property
    def io_bytes(self) -> int:
        """Traffic that no schedule avoids: every input read once, the output written once."""
        return sum(self.num_bytes(tensor.name) for tensor in self.inputs) + self.num_bytes(self.output)

    @property
    def intermediate_bytes(self) -> int:
        """Traffic that fusion saves at least: every intermediate written once and read once by each of its readers."""
        reads = [name for stage in self.stages for name in operands(stage)]
        return sum(self.num_bytes(name) * (1 + reads.count(name)) for name in self.intermediates)

    def __str__(self) -> str:
        tensors = self.tensors
        named = {name: f"{name}[{','.join(letters)}]" for name, letters in tensors.items()}
        stages = "; ".join(_written(stage, named) for stage in self.stages)
        sizes = " ".join(f"{dim.name}={dim.size}{' (batch)' * dim.batch}" for dim in self.dims)
        return f"{stages} | {sizes} | {self.dtype}"


def _written(stage: Stage, named: dict[str, str]) -> str:
    match stage:
        case MatMul():
            return f"{named[stage.out]} = {named[stage.left]} {named[stage.right]}"
        case Elementwise(x, "add" | "mul" as operation, operand):
            return f"{x} {'+' if operation == 'add' else '*'}= {named.get(str(operand), operand)}"
        case Elementwise(x, operation, operand):
            arguments = x if operand is None else f"{x}, {named[str(operand)]}"
            return f"{x} = {operation}({arguments})"
        case Causal(x, row, column, diagonal):
            shift = f" {'+' if diagonal > 0 else '-'} {abs(diagonal)}" if diagonal else ""
            return f"{x} = causal({x}, {column} <= {row}{shift})"
        case Softmax(x, over):
            return f"{x} = softmax({x}, {over})"
