"""A draft of a chain: products and stages in the order they run, with axes in place of letters.

Source: our definition (the paper's front end is TVM's).
"""

import dataclasses
from dataclasses import dataclass

from torch.fx import Node

from fusion.graph.axes import Axes, Axis, Layout
from fusion.plan.stages import Elementwise


class CutError(Exception):
    """A node that must be an input of the chain, or where no chain can end, and why."""

    def __init__(self, node: Node, reason: str) -> None:
        """Of a node, with a reason that a person can act on."""
        super().__init__(f"{node.name}: {reason}")
        self.node, self.reason = node, reason


@dataclass(frozen=True)
class Leaf:
    """An input: a node, the axes of its tensor, and whether it is a mask that has to be inverted first."""

    node: Node
    layout: Layout
    inverted: bool = False


@dataclass(frozen=True)
class DraftProduct:
    """`out = left right` summed over axes, as `node` computes it."""

    out: str
    names: tuple[str, str]
    """Of the operands, left and right."""
    nodes: tuple[Node | None, Node]
    """What `node` reads as operands; None for what attention keeps inside."""
    over: tuple[Axis, ...]
    node: Node


@dataclass(frozen=True)
class DraftCausal:
    """-inf in `x` where the index along `column` is above that along `row` plus the diagonal."""

    x: str
    row: tuple[Axis, ...]
    column: tuple[Axis, ...]
    diagonal: int


@dataclass(frozen=True)
class DraftSoftmax:
    """A softmax of `x` over axes."""

    x: str
    over: tuple[Axis, ...]


DraftStage = DraftProduct | Elementwise | DraftCausal | DraftSoftmax


class Draft:
    """What was read up to one node."""

    def __init__(self, root: Node) -> None:
        """Of nothing yet.

        Args:
            root: Where the chain ends.
        """
        self.root, self.axes = root, Axes()
        self.layout: Layout = tuple((self.axes.new(size),) for size in root.meta["val"].shape)
        self.inputs: dict[str, Leaf] = {}
        self.stages: list[DraftStage] = []
        self.covered: dict[Node, None] = {}
        """Nodes that need not be computed any more; a dict keeps their order."""
        self.latest: dict[str, Node] = {}
        """Value -> the node that it is after its last stage."""
        self._known: dict[Node, tuple[str, Layout]] = {}
        self._read: set[str] = set()

    @property
    def products(self) -> list[DraftProduct]:
        """The products, in order."""
        return [stage for stage in self.stages if isinstance(stage, DraftProduct)]

    @property
    def output(self) -> str:
        """The last product's value."""
        return self.products[-1].out

    def add_input(self, leaf: Leaf) -> str:
        """Name an input.

        Args:
            leaf: What it is.
        """
        name = f"input{len(self.inputs)}"
        self.inputs[name] = leaf
        return name

    def multiply(
        self, names: tuple[str, str], nodes: tuple[Node | None, Node], over: tuple[Axis, ...], node: Node
    ) -> str:
        """Add a product and name its value.

        Args:
            names: Of its operands, left and right.
            nodes: Its operands as it reads them; None for what attention keeps inside.
            over: What is summed over.
            node: That computes it.
        """
        self._read |= set(names)
        name = f"value{len(self.products)}"
        self.stages.append(DraftProduct(name, names, nodes, over, node))
        return name

    def change(self, stage: Elementwise | DraftCausal | DraftSoftmax) -> None:
        """Add a stage.

        Args:
            stage: It changes a value in place.

        Raises:
            CutError: Something has read the value already.
        """
        if isinstance(stage, Elementwise) and isinstance(stage.operand, str):
            self._read.add(stage.operand)
        if stage.x in self._read:
            node = self.latest[stage.x]
            raise CutError(node, f"{node.name} is read by {len(node.users)} operations, so it must be written out")
        self.stages.append(stage)

    def remember(self, node: Node, layout: Layout, name: str) -> None:
        """A node has been read as the present state of a value.

        Args:
            node: That computes the state.
            layout: Of its tensor.
            name: Of the value.
        """
        self._known[node], self.latest[name] = (name, layout), node
        self.covered[node] = None

    def recall(self, node: Node, layout: Layout) -> str | None:
        """The value whose present state a node is, if it has been read before.

        Args:
            node: Any.
            layout: Of its tensor.

        Raises:
            CutError: The value has changed since, or was read along other axes.
        """
        if node not in self._known:
            return None
        name, known = self._known[node]
        if self.latest[name] is not node:
            raise CutError(node, f"{node.name} is read before and after a stage, so it must be written out")
        if not self.axes.same(layout, known):
            raise CutError(node, f"{node.name} is read along other dimensions too, so it must be written out")
        return name

    def share_sums(self) -> None:
        """Products that read an input along the same axes but for their sums, each of two inputs, sum over the same.

        Then a gated pair reads its rows once.
        """
        pairs = [product for product in self.products if all(name in self.inputs for name in product.names)]
        for index, second in enumerate(pairs):
            for first in pairs[:index]:
                over, other = self.axes.atoms(first.over), self.axes.atoms(second.over)
                new = dict(zip(other, over, strict=False))
                fits = [axis.size for axis in over] == [axis.size for axis in other] and over != other
                if fits and any(self._alike(a, b, new) for a in first.names for b in second.names):
                    self.axes.unite(over, other)
                    break
        kept: dict[tuple[object, ...], str] = {}
        names = {name: kept.setdefault(self._identity(leaf), name) for name, leaf in self.inputs.items()}
        self.inputs = {name: self.inputs[name] for name in kept.values()}
        self.stages = [self._renamed(stage, names) for stage in self.stages]

    def _alike(self, first: str, second: str, new: dict[Axis, Axis]) -> bool:
        a, b = self.inputs[first], self.inputs[second]
        layouts = zip(a.layout, b.layout, strict=False)
        return a.node is b.node and all(
            self.axes.atoms(one) == tuple(new.get(axis, axis) for axis in self.axes.atoms(other))
            for one, other in layouts
        )

    def _identity(self, leaf: Leaf) -> tuple[object, ...]:
        return leaf.node, leaf.inverted, tuple(self.axes.atoms(axes) for axes in leaf.layout)

    @staticmethod
    def _renamed(stage: DraftStage, names: dict[str, str]) -> DraftStage:
        match stage:
            case DraftProduct(names=(left, right)):
                return dataclasses.replace(stage, names=(names.get(left, left), names.get(right, right)))
            case Elementwise(operand=str(operand)):
                return dataclasses.replace(stage, operand=names.get(operand, operand))
            case _:
                return stage

    def node_of(self, value: str) -> Node:
        """The node whose tensor a value is, or for what attention keeps inside, attention's.

        Args:
            value: Of a product.
        """
        products = {product.out: product.node for product in self.products}
        return self.latest.get(value, products[value])
