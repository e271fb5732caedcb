import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusion.graph.constants import MAX_ENTRIES, causal, evaluate, number
from fusion.graph.trace import trace

INF = math.inf


def result(function, *args):
    """The node of what a function returns."""
    return list(trace(function, args, {}).graph_module.graph.nodes)[-1].args[0][0]


@pytest.mark.parametrize(
    ("spelling", "expected"),
    [
        (lambda: torch.tensor(2.5), 2.5),
        (lambda: torch.full((), -INF), -INF),
        (lambda: torch.sqrt(torch.tensor(64.0)), 8.0),
        (lambda: torch.full((3, 4), 7.0), 7.0),
        (lambda: torch.zeros(1, 1), 0.0),
        (lambda: torch.scalar_tensor(-INF), -INF),
        (lambda: torch.ones(2), None),
        (lambda: torch.rand(()), None),
        (lambda: torch.empty(()), None),
    ],
)
def test_numbers_are_told_however_they_are_made(spelling, expected):
    assert number(result(spelling)) == expected


@pytest.mark.parametrize("value", [3, 2.5, True, -INF])
def test_python_numbers_are_numbers(value):
    assert number(value) == value


def test_a_tensor_from_outside_is_no_number():
    outside = torch.tensor(2.0)
    assert number(result(lambda: outside * 2)) is None
    assert number(result(lambda x: torch.full_like(x, 3.0), torch.randn(4))) == 3.0
    assert number(result(lambda x: x + 1, torch.randn(()))) is None
    assert number(None) is None


@pytest.mark.parametrize(
    "spelling",
    [
        lambda: torch.ones(5, 7, dtype=torch.bool).tril(2),
        lambda: torch.ones(5, 7).tril(2) == 1,
        lambda: ~torch.ones(5, 7, dtype=torch.bool).triu(3),
        lambda: torch.triu(torch.full((5, 7), -INF), 3) == 0,
        lambda: torch.arange(7)[None, :] <= torch.arange(5)[:, None] + 2,
        lambda: torch.arange(5).unsqueeze(1) >= torch.arange(7) - 2,
        lambda: torch.tril(torch.ones(1, 1, 5, 7, device="cpu"), 2).bool()[0, 0],
    ],
)
def test_masks_are_computed_however_they_are_spelled(spelling):
    mask = evaluate(result(spelling))
    assert torch.equal(mask, torch.ones(5, 7, dtype=torch.bool).tril(2))
    assert causal(mask) == (False, 2)


def test_what_is_too_large_stays_what_it_is():
    side = math.isqrt(MAX_ENTRIES) + 1
    assert evaluate(result(lambda: torch.ones(side, side, dtype=torch.bool).expand(side, side)[:1])) is None


@given(st.integers(1, 6), st.integers(1, 6), st.integers(-8, 8), st.booleans())
def test_causal_masks_are_told_with_their_diagonal(rows, columns, diagonal, swapped):
    mask = torch.ones(rows, columns, dtype=torch.bool).tril(diagonal)
    found = causal(mask.T if swapped else mask)
    assert found is not None
    other, own = found
    again = torch.ones(mask.T.shape if other != swapped else mask.shape, dtype=torch.bool).tril(own)
    assert torch.equal(again.T if other != swapped else again, mask)


def test_other_masks_are_not_causal():
    band = torch.ones(6, 6, dtype=torch.bool).tril().triu(-2)
    assert causal(band) is None
    assert causal(torch.tensor([[True, False], [False, True]])) is None
