"""Reading a graph backwards from where a chain ends: what may be kept on chip becomes a draft, the rest its inputs.

Source: our definition (the paper's front end is TVM's).
"""

from collections.abc import Container, Iterator, Mapping
from functools import singledispatchmethod
from types import MappingProxyType

import torch
from torch import Tensor
from torch.fx import Node

from fusion.graph.axes import Axis, Layout, ViewError
from fusion.graph.constants import causal, evaluate
from fusion.graph.draft import CutError, Draft, DraftCausal, DraftSoftmax, Leaf
from fusion.graph.operations import Activate, Combine, Mask, Normalize, Numeric, View
from fusion.graph.products import BATCH, Attention, Product
from fusion.graph.uses import Uses
from fusion.graph.views import look_behind, shape
from fusion.plan.chain import DType
from fusion.plan.stages import Elementwise, Operation

aten = torch.ops.aten
DTYPES: Mapping[torch.dtype, DType] = MappingProxyType(
    {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
)
NEGATIONS = frozenset((aten.bitwise_not.default, aten.logical_not.default))


def read(uses: Uses, cuts: Container[Node], root: Node) -> Draft:
    """Read the chain that ends at a node.

    Args:
        uses: Of the graph.
        cuts: Nodes that are inputs, whatever computes them.
        root: Where the chain ends.

    Returns:
        The draft.

    Raises:
        CutError: At the root: no chain ends there. At another node: it has to be cut off.
    """
    reader = _Reader(uses, cuts, root)
    reader.read(root, reader.draft.layout, root)
    reader.draft.share_sums()
    return reader.draft


class _Reader:
    def __init__(self, uses: Uses, cuts: Container[Node], root: Node) -> None:
        self.uses, self.cuts, self.root = uses, cuts, root
        self.dtype = root.meta["val"].dtype
        self.draft = Draft(root)
        self.axes = self.draft.axes

    def read(self, node: Node, layout: Layout, reader: Node) -> str:
        """Name of the value or the input that an operand of `reader` is."""
        path = list(self.behind(node, layout))
        deepest, own = path[-1]
        if not self.may_be_value(deepest):
            fitting = [(node, layout) for node, layout in path if node.meta["val"].dtype == self.dtype]
            if not fitting:
                raise CutError(reader, f"{node.name} is {node.meta['val'].dtype}, not {self.dtype}: cast it first")
            return self.draft.add_input(Leaf(*fitting[-1]))
        reasons = [self.uses.outside(node) for node, _ in path if node is not self.root]
        if any(reasons):
            raise CutError(deepest, next(filter(None, reasons)))
        name = self.draft.recall(deepest, own)
        if name is None:
            name = self.compute(self.uses.operations[deepest], deepest, own)
            self.draft.remember(deepest, own, name)
        self.draft.covered |= dict.fromkeys(node for node, _ in path)
        return name

    def behind(self, node: Node, layout: Layout) -> Iterator[tuple[Node, Layout]]:
        """A node and what it shows in another way, as far as the chain may look."""
        while True:
            yield node, layout
            operation = self.uses.operations[node]
            if not isinstance(operation, View) or node in self.cuts:
                return
            if self.uses.sections[node] != self.uses.sections[self.root]:
                return  # a copy made before something was written into what it was made of
            if operation.x.meta["val"].dtype not in (self.dtype, torch.float32, torch.bool):
                return
            try:
                node, layout = operation.x, look_behind(self.axes, node, layout)
            except ViewError:
                return

    def may_be_value(self, node: Node) -> bool:
        """Whether products lie behind a node that is not cut off."""
        operation = self.uses.operations[node]
        while node not in self.cuts and isinstance(operation, View):
            node = operation.x
            operation = self.uses.operations[node]
        return node not in self.cuts and self.uses.depths[node] > 0

    def operand(self, node: Node, labels: str, axes: Mapping[str, tuple[Axis, ...]]) -> Layout:
        """The layout of a tensor whose dimensions are the last of the labels; what is broadcast has no axes."""
        layout = []
        for label, size in zip(labels[len(labels) - len(shape(node)) :], shape(node), strict=True):
            wide = any(axis.size > 1 for axis in axes[label])
            layout.append(() if size == 1 and wide else axes[label])
        return tuple(layout)

    def trunk(self, x: Node, layout: Layout, reader: Node) -> str:
        """The value that a stage changes."""
        name = self.read(x, layout, reader)
        if name in self.draft.inputs:
            raise CutError(reader, "")
        return name

    def change(self, x: str, operation: Operation, operand: str | float | None = None) -> None:
        self.draft.change(Elementwise(x, operation, operand))

    def mask(self, x: str, mask: Node, layout: Layout, *, keeps: bool) -> None:
        """Leave -inf in a value where a boolean tensor is not `keeps`."""
        constant = evaluate(mask)
        if constant is not None and self.causal(x, constant == keeps, layout):
            return
        inverted = not keeps
        while True:
            path = [(node, own) for node, own in self.behind(mask, layout) if node.meta["val"].dtype == torch.bool]
            mask, layout = path[-1]
            source = mask.args[0] if mask.target in NEGATIONS and mask not in self.cuts else None
            if not isinstance(source, Node) or source.meta["val"].dtype != torch.bool:
                self.change(x, "mask", self.draft.add_input(Leaf(mask, layout, inverted)))
                return
            mask, inverted = source, not inverted

    def add(self, x: str, addend: Node, layout: Layout, reader: Node) -> None:
        """Add a tensor to a value; a constant of 0 and -inf is a mask."""
        constant = evaluate(addend)
        is_mask = constant is not None and bool(((constant == 0) | (constant == -torch.inf)).all())
        if constant is not None and is_mask and self.causal(x, constant == 0, layout):
            return
        self.change(x, "add", self.read(addend, layout, reader))

    def causal(self, x: str, keep: Tensor, layout: Layout) -> bool:
        """Add the stage that a constant mask is, if there is one for it."""
        if bool(keep.all()):
            return True
        if keep.ndim < 2 or keep.numel() != keep.shape[-1] * keep.shape[-2] or not layout[-1] or not layout[-2]:
            return False
        found = causal(keep.reshape(keep.shape[-2:]))
        if found is None:
            return False
        swapped, diagonal = found
        row, column = layout[:-3:-1] if swapped else layout[-2:]
        self.draft.change(DraftCausal(x, row, column, diagonal))
        return True

    @singledispatchmethod
    def compute(self, operation: object, node: Node, layout: Layout) -> str:
        """Add the stages of a node behind those of its operands, and name its value."""
        raise TypeError(f"{node.name} is no operation of a chain: {operation}")

    @compute.register
    def _(self, operation: View, node: Node, layout: Layout) -> str:
        raise CutError(node, f"{node.name} mixes dimensions or casts, so {operation.x.name} must be written out")

    @compute.register
    def _(self, operation: Product, node: Node, layout: Layout) -> str:
        left_labels, right_labels, labels = operation.labels
        self.check_dtype(node, operation.left, operation.right)
        sizes = dict(zip(left_labels, shape(operation.left), strict=True))
        axes = dict(zip(labels, layout, strict=True))
        axes |= {label: (self.axes.new(sizes[label]),) for label in operation.summed}
        addend = operation.addend
        name = None if addend is None or not self.may_be_value(addend) else self.bias(addend, labels, axes, node)
        left = self.read(operation.left, self.operand(operation.left, left_labels, axes), node)
        right = self.read(operation.right, self.operand(operation.right, right_labels, axes), node)
        over = tuple(axis for label in operation.summed for axis in axes[label])
        value = self.draft.multiply((left, right), (operation.left, operation.right), over, node)
        if operation.scale != 1.0:
            self.change(value, "mul", operation.scale)
        if addend is not None:
            self.change(value, "add", name or self.bias(addend, labels, axes, node))
        return value

    def bias(self, addend: Node, labels: str, axes: Mapping[str, tuple[Axis, ...]], node: Node) -> str:
        return self.read(addend, self.operand(addend, labels, axes), node)

    @compute.register
    def _(self, operation: Attention, node: Node, layout: Layout) -> str:
        query, key, value = operation.query, operation.key, operation.value
        self.check_dtype(node, query, key, value)
        lead = BATCH[: len(layout) - 2]
        axes = dict(zip(f"{lead}mh", layout, strict=True))
        axes |= {"k": (self.axes.new(shape(key)[-1]),), "n": (self.axes.new(shape(key)[-2]),)}
        shared = dict(axes)
        if operation.grouped:
            heads = shape(key)[-3]
            shared[lead[-1]] = self.axes.divide(axes[lead[-1]], (heads, shape(query)[-3] // heads))[0]
        left = self.read(query, self.operand(query, f"{lead}mk", axes), node)
        right = self.read(key, self.operand(key, f"{lead}nk", shared), node)
        scores = self.draft.multiply((left, right), (query, key), axes["k"], node)
        self.change(scores, "mul", operation.scale)
        if operation.mask is not None:
            mask_layout = self.operand(operation.mask, f"{lead}mn", axes)
            if operation.mask.meta["val"].dtype == torch.bool:
                self.mask(scores, operation.mask, mask_layout, keeps=True)
            else:
                self.add(scores, operation.mask, mask_layout, node)
        if operation.causal:
            self.draft.change(DraftCausal(scores, axes["m"], axes["n"], 0))
        self.draft.change(DraftSoftmax(scores, axes["n"]))
        right = self.read(value, self.operand(value, f"{lead}nh", shared), node)
        return self.draft.multiply((scores, right), (None, value), axes["n"], node)

    @compute.register
    def _(self, operation: Numeric, node: Node, layout: Layout) -> str:
        name = self.trunk(operation.x, layout, node)
        for kind, number in operation.steps:
            self.change(name, "add" if kind == "add" else "mul", number)
        return name

    @compute.register
    def _(self, operation: Activate, node: Node, layout: Layout) -> str:
        name = self.trunk(operation.x, layout, node)
        if operation.activation != "identity":
            self.change(name, operation.activation)
        self.draft.covered |= dict.fromkeys(operation.inside)
        return name

    @compute.register
    def _(self, operation: Mask, node: Node, layout: Layout) -> str:
        name = self.trunk(operation.x, layout, node)
        labels = BATCH[: len(layout)]
        mask_layout = self.operand(operation.mask, labels, dict(zip(labels, layout, strict=True)))
        self.mask(name, operation.mask, mask_layout, keeps=operation.keeps)
        return name

    @compute.register
    def _(self, operation: Normalize, node: Node, layout: Layout) -> str:
        name = self.trunk(operation.x, layout, node)
        self.draft.change(DraftSoftmax(name, layout[operation.dim]))
        return name

    @compute.register
    def _(self, operation: Combine, node: Node, layout: Layout) -> str:
        pairs = [(operation.first, operation.second, False), (operation.second, operation.first, True)]
        fitting = [pair for pair in pairs if shape(pair[0]) == shape(node) and self.may_be_value(pair[0])]
        if not fitting and any(self.may_be_value(x) for x, _, _ in pairs):
            raise CutError(node, f"{node.name} makes its product larger: expand an operand of the product instead")
        if not fitting:
            raise CutError(node, "")
        x, other, swapped = max(fitting, key=lambda pair: self.uses.depths[pair[0]])
        labels = BATCH[: len(layout)]
        other_layout = self.operand(other, labels, dict(zip(labels, layout, strict=True)))
        if operation.kind == "add" and not self.may_be_value(other):
            name = self.trunk(x, layout, node)
            self.add(name, other, other_layout, node)
            return name
        operand = self.read(other, other_layout, node)  # before x, whose product has to be the last
        name = self.trunk(x, layout, node)
        if operation.kind == "sub":
            self.change(name, "mul", -1.0)
        self.change(name, "mul" if operation.kind == "mul" else "add", operand)
        if operation.kind == "sub" and not swapped:
            self.change(name, "mul", -1.0)
        return name

    def check_dtype(self, node: Node, *tensors: Node) -> None:
        for tensor in tensors:
            dtype = tensor.meta["val"].dtype
            if dtype not in DTYPES:
                kind = "dtype" if dtype.is_floating_point or dtype.is_complex else "integer matmul,"
                raise CutError(node, f"{kind} {dtype}: accepted are float32, float16 and bfloat16")
            if dtype != self.dtype:
                raise CutError(node, f"its product is in {dtype}, what reads it in {self.dtype}: use one dtype")
            if 0 in (*shape(tensor), *shape(node)):
                raise CutError(node, f"{tensor.name} or {node.name} is empty: nothing to compute")
