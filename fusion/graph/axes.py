"""Axes: what a tensor's dimensions are made of, so that views can be followed through products.

A layout says for each dimension of a tensor which axes it is made of, outermost first: a tensor [B, S, K] that is
viewed as [B S, K] has the layout ((b, s), (k,)). Reading a graph from its results to its sources, a view only moves
axes between dimensions; where it needs a part of an axis, the axis is split, everywhere at once.

Source: our definition (the paper's front end is TVM's).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """Something to iterate over; `number` tells axes of one size apart."""

    number: int
    size: int


Layout = tuple[tuple[Axis, ...], ...]


class ViewError(ValueError):
    """A view that does not only move axes."""


class Axes:
    """The axes of one chain, and how they were split."""

    def __init__(self) -> None:
        """Of a chain that nothing is known of."""
        self._count = 0
        self._parts: dict[Axis, tuple[Axis, ...]] = {}

    def new(self, size: int) -> Axis:
        """An axis that no tensor has yet.

        Args:
            size: Of the axis.
        """
        self._count += 1
        return Axis(self._count, size)

    def atoms(self, axes: Iterable[Axis]) -> tuple[Axis, ...]:
        """Axes with those that were split replaced by their parts.

        Args:
            axes: Outermost first.
        """
        atoms: list[Axis] = []
        for axis in axes:
            atoms += self.atoms(self._parts[axis]) if axis in self._parts else (axis,)
        return tuple(atoms)

    def unite(self, axes: Iterable[Axis], others: Iterable[Axis]) -> None:
        """From now on the others are the same as the axes, one by one.

        Args:
            axes: Atoms.
            others: Atoms that are in no tensor together with them, of the same sizes.
        """
        self._parts |= {other: (axis,) for axis, other in zip(axes, others, strict=True)}

    def same(self, first: Layout, second: Layout) -> bool:
        """Whether two layouts of one tensor mean the same.

        Args:
            first: One.
            second: The other.
        """
        return [self.atoms(axes) for axes in first] == [self.atoms(axes) for axes in second]

    def divide(self, axes: Iterable[Axis], sizes: Sequence[int]) -> Layout:
        """Axes in their order as the dimensions of a reshaped tensor.

        Args:
            axes: Of all dimensions before, outermost first; where their number of entries differs, they do not fit.
            sizes: Of the dimensions after.

        Returns:
            The layout; axes of size 1 stand where a dimension of size 1 can have them, or nowhere.

        Raises:
            ViewError: Some dimension would hold a part of an axis that is no factor of it.
        """
        left = list(self.atoms(axes))[::-1]
        layout = []
        for size in sizes:
            dimension: list[Axis] = []
            missing = size
            while missing > 1 and left:
                axis = left.pop()
                if axis.size > missing and axis.size % missing == 0:
                    self._parts[axis] = self.new(missing), self.new(axis.size // missing)
                    left += self._parts[axis][::-1]
                    continue
                if missing % axis.size:
                    raise ViewError(f"a dimension of {size} takes a part of one of {axis.size} that is no factor of it")
                if axis.size > 1:
                    dimension.append(axis)
                missing //= axis.size
            if size == 1 and left and left[-1].size == 1:
                dimension.append(left.pop())
            layout.append(tuple(dimension))
        if any(axis.size > 1 for axis in left) or any(
            math.prod(axis.size for axis in dimension) != size for dimension, size in zip(layout, sizes, strict=True)
        ):
            raise ViewError(f"the sizes {tuple(sizes)} have another number of entries")
        return tuple(layout)
