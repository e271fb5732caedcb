"""Views: how a layout of an operation's result becomes the layout of what it was made of, where that is only a view.

Copies that leave every entry as it is (contiguous, the heads that repeat_interleave repeats, dropout that is off) count
as views: a kernel reads the original. Casts count too; whether a chain may look behind one, its reader decides.

Source: our definition (the paper's front end is TVM's).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from fusion.graph.axes import Axes, Layout, ViewError

aten = torch.ops.aten

PERMUTATIONS = frozenset(
    (
        aten.adjoint.default, aten.mT.default, aten.movedim.int, aten.movedim.intlist, aten.numpy_T.default,
        aten.permute.default, aten.swapaxes.default, aten.swapdims.default, aten.t.default, aten.transpose.int,
    )
)  # fmt: skip
RESHAPES = frozenset(
    (
        aten._unsafe_view.default, aten.flatten.using_ints, aten.reshape.default, aten.reshape_as.default,
        aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unflatten.int, aten.unsqueeze.default,
        aten.view.default, aten.view_as.default,
    )
)  # fmt: skip
EXPANSIONS = frozenset((aten.broadcast_to.default, aten.expand.default, aten.expand_as.default))
CASTS = frozenset(
    (
        aten._to_copy.default, aten.to.device, aten.to.dtype, aten.to.dtype_layout, aten.to.other, aten.type_as.default,
    )
)  # fmt: skip
COPIES = frozenset((aten.alias.default, aten.clone.default, aten.contiguous.default, aten.slice.Tensor, *CASTS))


def shape(node: Node) -> tuple[Any, ...]:
    """Sizes of a node's tensor; ints but where a graph was traced with symbols.

    Args:
        node: With a tensor as its value.
    """
    return tuple(node.meta["val"].shape)


def viewed(node: Node) -> Node | None:
    """What an operation only shows in another way, or None where it computes.

    Args:
        node: Of a graph whose nodes know their values.
    """
    source = node.args[0] if node.args else None
    if not isinstance(source, Node) or not isinstance(source.meta.get("val"), torch.Tensor):
        return None
    if node.target in PERMUTATIONS | RESHAPES | EXPANSIONS | {aten.repeat_interleave.self_int}:
        return source
    if node.target in COPIES and shape(node) == shape(source):
        same_device = node.meta["val"].device == source.meta["val"].device
        return source if same_device else None
    if node.target is aten.dropout.default and not drops(node):
        return source
    return None


def drops(node: Node) -> bool:
    """Whether a dropout is on.

    Args:
        node: A call of aten.dropout.
    """
    _, probability, train = node.args
    return bool(train) and bool(probability)


def look_behind(axes: Axes, node: Node, layout: Layout) -> Layout:
    """The layout of `viewed(node)` if the node's own is `layout`.

    Args:
        axes: Which may be split.
        node: One that only shows something in another way.
        layout: Of its tensor; a dimension of one entry may be without an axis.

    Returns:
        The layout before; what was expanded has no axes.

    Raises:
        ViewError: The view takes a part of a dimension that is no factor of it.
    """
    source = viewed(node)
    assert source is not None
    if node.target in PERMUTATIONS:
        order = _order(node.target, len(layout), node.args[1:])
        return tuple(layout[order.index(dim)] for dim in range(len(layout)))
    if node.target in RESHAPES:
        return axes.divide([axis for dimension in layout for axis in dimension], shape(source))
    if node.target in EXPANSIONS:
        return narrow(layout, shape(node), shape(source))
    if node.target is aten.repeat_interleave.self_int:
        return _without_repeats(axes, node, layout)
    return layout


def narrow(layout: Layout, wide: tuple[int, ...], sizes: tuple[int, ...]) -> Layout:
    """The layout of a tensor that is broadcast to another.

    Args:
        layout: Of the other.
        wide: The other's sizes.
        sizes: Its own sizes; dimensions that it lacks are the other's first.

    Returns:
        Its own layout; what is broadcast has no axes.
    """
    missing = len(wide) - len(sizes)
    pairs = zip(layout[missing:], wide[missing:], sizes, strict=True)
    return tuple(dimension if own == other else () for dimension, other, own in pairs)


def _order(permute: Callable[..., torch.Tensor], ndim: int, arguments: tuple[Any, ...]) -> list[int]:
    """For each dimension of a permuted tensor which one it was, told by sizes that differ."""
    probe = torch.empty(tuple(range(2, 2 + ndim)), device="meta")
    return [size - 2 for size in permute(probe, *arguments).shape]


def _without_repeats(axes: Axes, node: Node, layout: Layout) -> Layout:
    """Grouped heads: of the axis (head, repeat) that repeat_interleave made only the head is left."""
    repeats, dim = node.args[1], node.args[2] if len(node.args) > 2 else None
    if not isinstance(repeats, int) or not isinstance(dim, int):
        raise ViewError("repeat_interleave needs a number of repeats and a dim to be a view")
    size = shape(node)[dim] // max(repeats, 1)
    heads, _ = axes.divide(layout[dim], (size, repeats))
    dim %= len(layout)
    return (*layout[:dim], heads, *layout[dim + 1 :])
