import math
import re

import pytest
import torch
from torch.nn import functional

from fusion.graph.operations import (
    Activate,
    Combine,
    Mask,
    Normalize,
    Numeric,
    View,
    recognize,
)
from fusion.graph.trace import trace

INF = math.inf
X, Y, Z = torch.randn(7, 6), torch.randn(6, 8), torch.randn(7, 8)


def recognized(function, *args):
    """What the node of a function's result is."""
    return recognize(list(trace(function, args, {}).graph_module.graph.nodes)[-1].args[0][0])


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x * 3, (("mul", 3.0),)),
        (lambda x: 3 * x, (("mul", 3.0),)),
        (lambda x: x / 4, (("mul", 0.25),)),
        (lambda x: x / torch.sqrt(torch.tensor(16.0)), (("mul", 0.25),)),
        (lambda x: x + 3, (("add", 3.0),)),
        (lambda x: torch.add(x, 3, alpha=2), (("add", 6.0),)),
        (lambda x: x - 3, (("add", -3.0),)),
        (lambda x: 3 - x, (("mul", -1.0), ("add", 3.0))),
        (lambda x: torch.rsub(x, 3, alpha=2), (("mul", -2.0), ("add", 3.0))),
        (lambda x: -x, (("mul", -1.0),)),
        (lambda x: x * 1, ()),
        (lambda x: x + 0.0, ()),
    ],
)
def test_numbers_are_steps(function, expected):
    operation = recognized(function, X)
    assert isinstance(operation, Numeric)
    assert operation.steps == expected
    value = X.double()
    for kind, number in expected:
        value = value * number if kind == "mul" else value + number
    assert torch.equal(value.float(), function(X.double()).float())


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (lambda x, y: x + y, "add"),
        (lambda x, y: x * y, "mul"),
        (lambda x, y: x - y, "sub"),
        (lambda x, y: torch.rsub(y, x), "sub"),
    ],
)
def test_two_tensors_are_combined(function, kind):
    operation = recognized(function, X, X + 1)
    assert isinstance(operation, Combine)
    assert (operation.kind, operation.first.name, operation.second.name) == (kind, "arg0_1", "arg1_1")


@pytest.mark.parametrize(
    ("function", "activation"),
    [
        (functional.relu, "relu"),
        (functional.gelu, "gelu"),
        (lambda x: functional.gelu(x, approximate="tanh"), "gelu_tanh"),
        (functional.silu, "silu"),
        (lambda x: x * torch.sigmoid(x), "silu"),
        (lambda x: torch.sigmoid(x) * x, "silu"),
    ],
)
def test_activations_have_names(function, activation):
    operation = recognized(function, X)
    assert isinstance(operation, Activate)
    assert (operation.x.name, operation.activation) == ("arg0_1", activation)


@pytest.mark.parametrize(
    ("function", "keeps"),
    [
        (lambda x, m: x.masked_fill(m, -INF), False),
        (lambda x, m: x.masked_fill(m, torch.tensor(-INF)), False),
        (lambda x, m: torch.where(m, x, -INF), True),
        (lambda x, m: torch.where(m, -INF, x), False),
        (lambda x, m: torch.where(m, x, torch.full_like(x, -INF)), True),
    ],
)
def test_masks_keep_or_fill(function, keeps):
    operation = recognized(function, X, X > 0)
    assert isinstance(operation, Mask)
    assert (operation.x.name, operation.mask.name, operation.keeps) == ("arg0_1", "arg1_1", keeps)


def test_softmax_is_over_a_dimension():
    assert recognized(lambda x: functional.softmax(x, -1), X).dim == 1
    assert recognized(lambda x: x.softmax(0), X).dim == 0
    assert isinstance(recognized(lambda x: torch.special.softmax(x, 1), X), Normalize)


def test_views_are_views():
    assert isinstance(recognized(lambda x: x.T, X), View)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, y: x.cumsum(0), "operation aten.cumsum.default is no stage of a chain"),
        (lambda x, y: x.tanh(), "activation aten.tanh.default is none of relu, gelu, silu"),
        (lambda x, y: functional.dropout(x), "set p=0 or call eval"),
        (lambda x, y: x.masked_fill(x > 0, -1e9), "with -1000000000.0: fill with -inf"),
        (lambda x, y: torch.where(x > 0, x, x), "between two tensors: only -inf"),
        (lambda x, y: x / x, "of two tensors: multiply or add instead"),
        (lambda x, y: torch.tensor(1.0) / x, "by a tensor or by zero: multiply instead"),
        (lambda x, y: x / 0, "by a tensor or by zero: multiply instead"),
        (lambda x, y: x + INF, "use a boolean mask and -inf"),
        (lambda x, y: torch.add(x, x, alpha=2), "scaled beforehand"),
        (lambda x, y: (x @ y)[x.sum(1) > 0], "symbolic size: index is .*; trace with fixed sizes"),
        (lambda x, y: x.max(1)[0], "operation <built-in function getitem> is no stage of a chain"),
    ],
)  # fmt: skip
def test_what_is_nothing_says_why(function, reason):
    found = recognized(function, X, Y)
    assert isinstance(found, str)
    assert re.search(reason, found), found
