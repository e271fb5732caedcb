"""Which axes of a draft make one dimension.

Axes that every tensor has side by side are one, as far as strides allow: the rows of a batch of sequences under one
weight are just rows. An axis of size 1 is none, but where a product has no other rows, columns, or sum.

Source: our definition (the paper's front end is TVM's).
"""

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from fusion.graph.axes import Axis
from fusion.graph.draft import CutError, Draft, DraftCausal, DraftProduct, DraftSoftmax, Leaf

Dimension = tuple[Axis, ...]
"""Axes, outermost first, that are indexed as one."""


@dataclass
class Tensors:
    """The axes of every tensor of a draft, in no order that matters but for inputs."""

    axes: dict[str, dict[Axis, int]] = field(default_factory=dict)
    """Name -> axis -> its stride in the tensor; of a value, 0."""
    sums: dict[str, tuple[Axis, ...]] = field(default_factory=dict)
    """Value -> what its product sums over."""
    pinned: list[tuple[Axis, ...]] = field(default_factory=list)
    """Axes that a stage needs as one dimension of its own: a softmax's, a causal mask's rows and columns."""
    output: tuple[Axis, ...] = ()
    """In the order of the result in memory."""


def tensors(draft: Draft) -> Tensors:
    """The axes of every tensor, those of size 1 only where they have to be loops.

    Args:
        draft: Of a chain.

    Returns:
        Atoms: axes that nothing splits any more.

    Raises:
        CutError: A product's operand that is a value has no rows or columns of its own.
    """
    atoms = draft.axes.atoms
    result = _strides(draft, Leaf(draft.root, draft.layout))
    found = Tensors(output=tuple(sorted(result, key=lambda axis: -result[axis])))
    for name, leaf in draft.inputs.items():
        found.axes[name] = _strides(draft, leaf)
    for stage in draft.stages:
        match stage:
            case DraftCausal(row=row, column=column):
                found.pinned += [atoms(row), atoms(column)]
            case DraftSoftmax(over=over):
                found.pinned.append(atoms(over))
    needed = {axis for axes in found.pinned for axis in axes}
    for product in draft.products:
        over = found.sums[product.out] = atoms(product.over)
        left, right = (found.axes[name] for name in product.names)
        needed |= _needed(draft, product, left, right, over, needed)
        found.axes[product.out] = dict.fromkeys([axis for axis in (*left, *right) if axis not in over], 0)
    for name, own in found.axes.items():
        found.axes[name] = {axis: stride for axis, stride in own.items() if axis.size > 1 or axis in needed}
    found.output = tuple(axis for axis in found.output if axis in found.axes[draft.output])
    return found


def _strides(draft: Draft, leaf: Leaf) -> dict[Axis, int]:
    """The axes of a node's tensor, outermost dimension first, with their strides."""
    strides = {}
    for dimension, stride in zip(leaf.layout, leaf.node.meta["val"].stride(), strict=True):
        for axis in reversed(draft.axes.atoms(dimension)):
            strides[axis] = stride
            stride *= axis.size
    return strides


def _needed(
    draft: Draft,
    product: DraftProduct,
    left: dict[Axis, int],
    right: dict[Axis, int],
    over: tuple[Axis, ...],
    needed: Collection[Axis],
) -> set[Axis]:
    """Axes of size 1 that a product needs; operands that lack one get it."""
    sums = set(over) if all(axis.size == 1 for axis in over) else set()
    chosen = set(sums)
    for name, axes, absent in zip(product.names, (left, right), (right, left), strict=True):
        for axis in sums:
            _give(draft, product, name, axes, axis)
        own = [axis for axis in axes if axis not in absent and axis not in over]
        if any(axis.size > 1 or axis in needed for axis in own):
            continue
        if not own:
            own.append(draft.axes.new(1))
            _give(draft, product, name, axes, own[0])
        chosen.add(own[-1])
    return chosen


def _give(draft: Draft, product: DraftProduct, name: str, axes: dict[Axis, int], axis: Axis) -> None:
    if axis not in axes:
        if name not in draft.inputs:
            reason = f"{product.node.name} needs a dimension of size 1 that its operand lacks"
            raise CutError(draft.node_of(name), reason)
        axes[axis] = 0


def dimensions(found: Tensors) -> list[Dimension]:
    """Axes joined to dimensions as far as every tensor allows.

    Args:
        found: Of a draft.

    Returns:
        Every axis in one dimension, in the order of their first tensor.
    """
    groups: list[Dimension] = [(axis,) for axis in dict.fromkeys(axis for own in found.axes.values() for axis in own)]
    joined = True
    while joined:
        joined = False
        for first in groups:
            second = next((group for group in groups if group is not first and _is_one(found, first, group)), None)
            if second is not None:
                groups[groups.index(first)] = (*first, *second)
                groups.remove(second)
                joined = True
                break
    return groups


def _is_one(found: Tensors, first: Dimension, second: Dimension) -> bool:
    size = math.prod(axis.size for axis in second)
    if 1 in (size, math.prod(axis.size for axis in first)):
        return False
    together: list[Iterable[Axis]] = [*found.axes.values(), *found.sums.values(), *found.pinned]
    if any((first[0] in axes) != (second[0] in axes) for axes in together):
        return False
    strides = [(own[first[-1]], own[second[-1]]) for own in found.axes.values() if first[0] in own]
    after = found.output[found.output.index(first[-1]) + 1 :][:1] if first[-1] in found.output else second[:1]
    return after == second[:1] and all(outer == inner * size for outer, inner in strides)
