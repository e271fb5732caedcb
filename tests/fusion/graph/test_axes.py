import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion.graph.axes import Axes, ViewError


def sizes(layout):
    return [[axis.size for axis in dimension] for dimension in layout]


def test_dimensions_join_and_split():
    axes = Axes()
    b, s, k = (axes.new(size) for size in (2, 6, 5))
    assert axes.divide((b, s, k), (12, 5)) == ((b, s), (k,))
    layout = axes.divide((b, s, k), (2, 3, 10))
    assert sizes(layout) == [[2], [3], [2, 5]]
    assert axes.atoms((s,)) == (layout[1][0], layout[2][0])
    assert axes.atoms((k,)) == (k,)


def test_an_axis_is_split_everywhere_at_once():
    axes = Axes()
    heads, rows = axes.new(6), axes.new(4)
    before = ((heads,), (rows,))
    (group, repeat), own = axes.divide((heads,), (2, 3)), ((axes.new(6),), (rows,))
    assert axes.same(before, ((*group, *repeat), (rows,)))
    assert not axes.same(before, own)
    assert not axes.same(before, ((*repeat, *group), (rows,)))


@pytest.mark.parametrize(
    ("before", "after"), [((2, 3), (3, 2)), ((6,), (4,)), ((4,), (2, 3)), ((2,), (2, 2)), ((3,), ())]
)
def test_what_does_not_fit_is_refused(before, after):
    axes = Axes()
    with pytest.raises(ViewError, match=r"no factor of it|another number of entries"):
        axes.divide([axes.new(size) for size in before], after)


def test_axes_of_size_one_stand_where_a_dimension_has_them():
    axes = Axes()
    one, five = axes.new(1), axes.new(5)
    assert axes.divide((one, five), (1, 5)) == ((one,), (five,))
    assert axes.divide((one, five), (5,)) == ((five,),)
    assert axes.divide((five,), (1, 5, 1)) == ((), (five,), ())


def test_united_axes_are_one():
    axes = Axes()
    first, second = axes.new(4), axes.new(4)
    assert not axes.same(((first,),), ((second,),))
    axes.unite((first,), (second,))
    assert axes.same(((first,),), ((second,),))


@given(st.lists(st.integers(1, 4), max_size=5), st.data())
def test_any_way_to_join_neighbours_goes_there_and_back(factors, data):
    axes = Axes()
    layout = tuple((axes.new(size),) for size in factors)
    flat = [axis for dimension in layout for axis in dimension]
    cuts = sorted(data.draw(st.sets(st.integers(0, len(factors)))) | {0, len(factors)})
    joined = [math.prod(factors[a:b]) for a, b in itertools.pairwise(cuts)]
    there = axes.divide(flat, joined)
    assert [math.prod(axis.size for axis in dimension) for dimension in there] == joined
    back = axes.divide([axis for dimension in there for axis in dimension], factors)
    large = [dimension for dimension, size in zip(back, factors, strict=True) if size > 1]
    assert large == [dimension for dimension, size in zip(layout, factors, strict=True) if size > 1]
