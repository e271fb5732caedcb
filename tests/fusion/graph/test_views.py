import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from fusion.graph.axes import Axes, ViewError
from fusion.graph.trace import trace
from fusion.graph.views import drops, look_behind, narrow, shape, viewed

VIEWS = {
    "transpose": lambda x: x.transpose(0, -1),
    "permute": lambda x: x.permute(2, 0, 1),
    "mT": lambda x: x.mT,
    "adjoint": lambda x: x.adjoint(),
    "movedim": lambda x: x.movedim(0, 1),
    "movedims": lambda x: x.movedim((0, 1), (2, 0)),
    "swapaxes": lambda x: x.swapaxes(1, 2),
    "view": lambda x: x.view(4, 3, 10),
    "reshape": lambda x: x.reshape(-1, 2, 5),
    "flatten": lambda x: x.flatten(0, 1),
    "unflatten": lambda x: x.unflatten(1, (2, 3)),
    "unsqueeze": lambda x: x[:, None],
    "squeeze": lambda x: x.unsqueeze(1).squeeze(1),
    "expand": lambda x: x[:, None].expand(4, 2, 6, 5),
    "expand_as": lambda x: x.expand_as(torch.empty(3, 4, 6, 5)),
    "contiguous": lambda x: x.transpose(0, 1).contiguous(),
    "clone": lambda x: x.clone(),
    "whole slice": lambda x: x[:, 0:6],
    "repeat_interleave": lambda x: x.repeat_interleave(3, dim=1),
    "heads by expand": lambda x: x[:, :, None].expand(4, 6, 3, 5).reshape(4, 18, 5),
    "dropout that is off": lambda x: functional.dropout(x, 0.5, training=False),
    "dropout of nothing": lambda x: functional.dropout(x, 0.0),
    "cast": lambda x: x.double().float(),
    "chain": lambda x: x.transpose(0, 2).reshape(30, 4).unflatten(0, (5, 2, 3)).permute(3, 1, 0, 2).flatten(2),
}  # fmt: skip
OTHERS = {
    "select": lambda x: x[0],
    "slice": lambda x: x[:, 1:],
    "relu": lambda x: x.relu(),
    "detach": lambda x: x.detach(),
    "dropout": lambda x: functional.dropout(x, 0.5),
    "view of another dtype": lambda x: x.view(torch.int32),
    "repeat": lambda x: x.repeat(1, 2, 1),
}


def result_and_source(function, x):
    """The node of a function's result, and its placeholder."""
    nodes = list(trace(function, [x], {}).graph_module.graph.nodes)
    return nodes[-1].args[0][0], nodes[0]


def follow(function, x):
    """The function's result put together from its argument alone, by the layouts of both."""
    node, source = result_and_source(function, x)
    axes = Axes()
    layout = result = tuple((axes.new(size),) for size in shape(node))
    while node is not source:
        layout = look_behind(axes, node, layout)
        node = viewed(node)
    before = [axis for dimension in layout for axis in axes.atoms(dimension) if axis.size > 1]
    after = [axis for dimension in result for axis in axes.atoms(dimension) if axis.size > 1]
    known = [axis for axis in after if axis in before]
    entries = x.reshape([axis.size for axis in before]).permute([before.index(axis) for axis in known])
    spread = entries[tuple(slice(None) if axis in before else None for axis in after)]
    return spread.expand([axis.size for axis in after]).reshape([math.prod(a.size for a in d) for d in result])


@pytest.mark.parametrize("name", VIEWS)
def test_entries_are_where_the_layout_says(name):
    x = torch.randn(4, 6, 5)
    assert torch.equal(follow(VIEWS[name], x), VIEWS[name](x))


@pytest.mark.parametrize("name", OTHERS)
def test_what_computes_or_hides_is_no_view(name):
    node, _ = result_and_source(OTHERS[name], torch.randn(4, 6, 5))
    assert viewed(node) is None


@settings(max_examples=60)
@given(data=st.data())
def test_any_sequence_of_views_can_be_followed(data):
    steps = []
    x = torch.randn(4, 6, 2)
    current = x
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(["permute", "flatten", "unflatten", "unsqueeze", "expand", "repeat"]))
        dim = data.draw(st.integers(0, current.ndim - 1))
        if kind == "permute":
            order = data.draw(st.permutations(range(current.ndim)))
            step = lambda t, order=tuple(order): t.permute(order)  # noqa: E731
        elif kind == "flatten" and current.ndim > 1:
            dim = min(dim, current.ndim - 2)
            step = lambda t, dim=dim: t.flatten(dim, dim + 1)  # noqa: E731
        elif kind == "unflatten" and current.shape[dim] % 2 == 0:
            step = lambda t, dim=dim: t.unflatten(dim, (2, -1))  # noqa: E731
        elif kind == "expand":
            step = lambda t, dim=dim: t.unsqueeze(dim).expand(*t.shape[:dim], 2, *t.shape[dim:])  # noqa: E731
        elif kind == "repeat":
            step = lambda t, dim=dim: t.repeat_interleave(2, dim=dim)  # noqa: E731
        else:
            step = lambda t, dim=dim: t.unsqueeze(dim)  # noqa: E731
        steps.append(step)
        current = step(current)

    def function(t):
        for step in steps:
            t = step(t)
        return t

    try:
        found = follow(function, x)
    except ViewError:  # heads were split in ways that do not nest
        return
    assert torch.equal(found, current)


def test_a_view_that_takes_a_part_of_a_dimension_is_refused():
    node, _ = result_and_source(lambda x: x.reshape(8, 15), torch.randn(4, 30))
    axes = Axes()
    layout = look_behind(axes, node, tuple((axes.new(size),) for size in (8, 15)))
    assert [[axis.size for axis in dimension] for dimension in layout] == [[4], [2, 15]]
    node, _ = result_and_source(lambda x: x.reshape(3, 4), torch.randn(4, 3))
    with pytest.raises(ViewError, match="no factor"):
        look_behind(axes, node, ((axes.new(3),), (axes.new(4),)))


def test_repeats_need_a_number_and_a_dimension():
    node, _ = result_and_source(lambda x: x.repeat_interleave(3), torch.randn(4))
    with pytest.raises(ViewError, match="a number of repeats and a dim"):
        look_behind(Axes(), node, ((Axes().new(12),),))


def test_broadcast_dimensions_have_no_axes():
    axes = Axes()
    b, m, n = ((axes.new(size),) for size in (2, 3, 4))
    assert narrow((b, m, n), (2, 3, 4), (1, 4)) == ((), n)
    assert narrow((b, m, n), (2, 3, 4), (2, 1, 4)) == (b, (), n)
    assert narrow((b, m, n), (2, 3, 4), ()) == ()


@pytest.mark.parametrize(("options", "expected"), [((0.5, True), True), ((0.5, False), False), ((0.0, True), False)])
def test_a_dropout_is_on_or_off(options, expected):
    node, _ = result_and_source(lambda x: functional.dropout(x, *options), torch.randn(4))
    assert drops(node) is expected
