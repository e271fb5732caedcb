"""From a draft to a chain, and what of the graph each of its inputs is.

Names are those of `fusion.plan.workload`: values C, E, G, ... along the chain, C_up what multiplies or is added to C;
inputs A and B of the first product, then D, F, ..., and bias, mask, keep, gate, residual of what is no product.

Source: our definition (the paper's front end is TVM's).
"""

from collections.abc import Container, Iterator
from dataclasses import dataclass

from torch import Tensor

from fusion.graph.axes import Axis
from fusion.graph.dimensions import Tensors, dimensions, tensors
from fusion.graph.draft import CutError, Draft, DraftCausal, DraftProduct, DraftSoftmax, Leaf
from fusion.graph.letters import Letters, letters, size
from fusion.graph.reader import DTYPES
from fusion.plan.chain import Chain
from fusion.plan.stages import Causal, Dim, Elementwise, Input, MatMul, Softmax, Stage

VALUES = ("C", "E", "G", "I")
OPERANDS = ("A", "B", "D", "F", "H", "J", "L", "N")


@dataclass(frozen=True)
class Views:
    """How a tensor is seen as an input of a chain: its dimensions split, put in another order, and joined; no copy."""

    split: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...]

    def __call__(self, tensor: Tensor) -> Tensor:
        """The view.

        Args:
            tensor: As in the graph.

        Returns:
            The same entries as the chain's input.
        """
        return tensor.view(self.split).permute(self.order).view(self.shape)

    def __str__(self) -> str:
        permuted = tuple(self.split[position] for position in self.order)
        order = f".permute{self.order}" * (self.order != tuple(range(len(self.order))))
        return f".view{self.split}{order}" + f".view{self.shape}" * (self.shape != permuted)


@dataclass(frozen=True)
class Binding:
    """What an input of a chain is in the graph."""

    name: str
    """Of the input."""
    node: str
    """Whose tensor it is."""
    views: Views
    inverted: bool
    """Whether it is the contrary of a mask in the graph."""

    def __str__(self) -> str:
        return f"{self.name} = {'not ' * self.inverted}{self.node}{self.views}"


@dataclass(frozen=True)
class Match:
    """A chain in a graph."""

    chain: Chain
    bindings: tuple[Binding, ...]
    """Of the chain's inputs, in their order."""
    output: str
    """Node that the chain's output is."""
    views: Views
    """Of the chain's output: the node's tensor, strides included."""
    covered: tuple[str, ...]
    """Nodes that are not computed any more."""
    intermediates: tuple[str, ...]
    """Nodes whose values stay on chip and could be written out instead, in order."""

    def needs(self, differentiated: Container[str]) -> frozenset[str]:
        """Names of the inputs that need a gradient.

        Args:
            differentiated: Names of the nodes whose tensors need one.
        """
        return frozenset(binding.name for binding in self.bindings if binding.node in differentiated)

    def __str__(self) -> str:
        inputs = ", ".join(map(str, self.bindings))
        return f"{self.output}: {self.chain}\n    {inputs}"


def bind(draft: Draft) -> Match:
    """Make a draft a chain.

    Args:
        draft: As read.

    Returns:
        The chain with its place in the graph.

    Raises:
        CutError: A node has to be cut off before it is a chain.
    """
    found = tensors(draft)
    groups = dimensions(found)
    named = letters(draft, found, groups)
    missing = [axis for axis in found.output if all(axis not in group for group in named.of)]
    whole = [axis for dimension in draft.layout for axis in draft.axes.atoms(dimension) if axis.size > 1]
    if missing or set(whole) - set(found.output):
        raise CutError(draft.root, f"{draft.root.name} repeats entries of a product")
    names = _names(draft, found, named)
    of = {axis: letter for group, letter in named.of.items() for axis in group}
    inputs, bindings = [], []
    for name, leaf in draft.inputs.items():
        order = _storage_order(found.axes[name], named)
        inputs.append(Input(names[name], "".join(named.of[group] for group in order)))
        bindings.append(_binding(draft, leaf, names[name], order, set(found.axes[name])))
    dims = tuple(Dim(letter, size(group), letter in named.batch) for group, letter in named.of.items())
    stages = tuple(_stages(draft, names, of))
    try:
        chain = Chain(dims, tuple(inputs), stages, DTYPES[draft.root.meta["val"].dtype])
    except ValueError as error:
        raise CutError(draft.node_of(draft.products[0].out), f"no chain: {error}") from error
    inner = dict.fromkeys(node.name for value, node in draft.latest.items() if value != draft.output)
    covered = tuple(node.name for node in draft.covered)
    return Match(chain, tuple(bindings), draft.root.name, _output_views(draft, found), covered, tuple(inner))


def _storage_order(axes: dict[Axis, int], named: Letters) -> list[tuple[Axis, ...]]:
    """Dimensions of an input, the one with the largest stride first; what is repeated by a stride of 0 before all."""
    own = [group for group in named.of if group[0] in axes]
    return sorted(own, key=lambda group: -(axes[group[-1]] or float("inf")))


def _binding(draft: Draft, leaf: Leaf, name: str, order: list[tuple[Axis, ...]], own: set[Axis]) -> Binding:
    split = [axis for dimension in leaf.layout for axis in draft.axes.atoms(dimension) if axis in own]
    positions = tuple(split.index(axis) for group in order for axis in group if axis in split)
    shape = tuple(size(group) for group in order)
    return Binding(name, leaf.node.name, Views(tuple(axis.size for axis in split), positions, shape), leaf.inverted)


def _output_views(draft: Draft, found: Tensors) -> Views:
    own = [axis for dimension in draft.layout for axis in draft.axes.atoms(dimension) if axis in found.output]
    split = tuple(axis.size for axis in found.output)
    return Views(split, tuple(found.output.index(axis) for axis in own), tuple(draft.root.meta["val"].shape))


def _stages(draft: Draft, names: dict[str, str], of: dict[Axis, str]) -> Iterator[Stage]:
    def letter(axes: tuple[Axis, ...], x: str) -> str:
        found = {of[axis] for axis in draft.axes.atoms(axes) if axis in of}
        if len(found) != 1:
            node = draft.node_of(x)
            raise CutError(node, f"a stage of {node.name} is over {len(found)} dimensions, not one")
        return found.pop()

    for stage in draft.stages:
        match stage:
            case DraftProduct(out=out, names=(left, right), over=over):
                yield MatMul(names[out], names[left], names[right], over=letter(over, out))
            case DraftCausal(x, row, column, diagonal):
                yield Causal(names[x], row=letter(row, x), column=letter(column, x), diagonal=diagonal)
            case DraftSoftmax(x, over):
                yield Softmax(names[x], over=letter(over, x))
            case Elementwise(x, operation, operand):
                yield Elementwise(names[x], operation, names[operand] if isinstance(operand, str) else operand)


def _names(draft: Draft, found: Tensors, named: Letters) -> dict[str, str]:
    """A name for every value and every input of a draft."""
    names: dict[str, str] = {}
    side = {  # value that a stage reads -> value that the stage changes
        stage.operand: stage.x
        for stage in draft.stages
        if isinstance(stage, Elementwise) and isinstance(stage.operand, str) and stage.operand not in draft.inputs
    }
    along = [product for product in draft.products if product.out not in side]
    operands = iter(OPERANDS)
    for product, value in zip(along, VALUES, strict=False):
        names[product.out] = value
        names |= {name: next(operands) for name in product.names if name in draft.inputs and name not in names}
    for product in reversed(draft.products):
        if product.out in side:
            names[product.out] = _free(f"{names[side[product.out]]}_up", names)
            beside = next((other for other in along if names[other.out] == names[side[product.out]]), None)
            for place, name in enumerate(product.names):
                if name in draft.inputs and name not in names:
                    names[name] = _free(f"{names[beside.names[place]]}_up" if beside else "B_up", names)
    softmax = {stage.x for stage in draft.stages if isinstance(stage, DraftSoftmax)}
    for stage in draft.stages:
        if isinstance(stage, Elementwise) and isinstance(stage.operand, str) and stage.operand not in names:
            own = [letter for group, letter in named.of.items() if group[0] in found.axes[stage.operand]]
            num_loops = sum(letter not in named.batch for letter in own)
            names[stage.operand] = _free(_role(stage, num_loops, stage.x in softmax, names[stage.x]), names)
    return names


def _role(stage: Elementwise, num_loops: int, before_softmax: bool, value: str) -> str:
    match stage.operation:
        case "mask":
            return "keep"
        case "mul":
            return "gate"
        case _ if before_softmax:
            return "mask"
        case _ if num_loops > 1:
            return "residual"
        case _:
            return f"bias_{value}"


def _free(name: str, names: dict[str, str]) -> str:
    taken, number = set(names.values()), 2
    free = name
    while free in taken:
        free, number = f"{name}_{number}", number + 1
    return free
