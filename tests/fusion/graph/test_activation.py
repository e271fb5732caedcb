import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from fusion.graph.activation import activation_of, spelled_out
from fusion.graph.trace import trace

SPELLINGS = {
    "swish": (lambda x: x * torch.sigmoid(x), "silu"),
    "swish, turned around": (lambda x: torch.sigmoid(x) * x, "silu"),
    "swish by a quotient": (lambda x: x / (1 + torch.exp(-x)), "silu"),
    "gelu by erf": (lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))), "gelu"),
    "gelu by erf, shared out": (lambda x: x * (torch.erf(x * 0.70710678118) * 0.5 + 0.5), "gelu"),
    "gelu by tanh": (
        lambda x: 0.5 * x * (1.0 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0)))),
        "gelu_tanh",
    ),
    "gelu by tanh, factored out": (
        lambda x: 0.5 * x * (1 + torch.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x))),
        "gelu_tanh",
    ),
    "relu by clamp": (lambda x: x.clamp(min=0), "relu"),
    "relu by clamp_min": (lambda x: torch.clamp_min(x, 0), "relu"),
}
OTHERS = {
    "another scale": lambda x: x * torch.sigmoid(1.702 * x),
    "cut at six": lambda x: x.clamp(0, 6),
    "a sum of two": lambda x: x * torch.sigmoid(x + 1),
    "too long": lambda x: (x * 2 / 2 * 2 / 2 * 2 / 2 * 2 / 2 * 2 / 2 * 2 / 2).clamp_min(0) * 1.5,
    "of a row": lambda x: x * torch.sigmoid(x.sum(1, keepdim=True)),
    "of two tensors": lambda x: x * torch.sigmoid(x.T.contiguous().T + x.cumsum(0)),
    "a number": lambda x: x * 1.0,
}


def nodes_of(function):
    return list(trace(function, [torch.randn(5, 4)], {}).graph_module.graph.nodes)


@pytest.mark.parametrize("name", SPELLINGS)
def test_formulas_are_told_by_their_numbers(name):
    function, expected = SPELLINGS[name]
    *_, last, _ = nodes_of(lambda x: function(x.cumsum(0)))
    x, activation, inside = spelled_out(last)
    assert (x.name, activation) == ("cumsum", expected)
    assert last not in inside
    assert {node.name for node in inside} == {n.name for n in nodes_of(lambda x: function(x.cumsum(0)))[2:-2]}


@pytest.mark.parametrize("name", OTHERS)
def test_other_formulas_are_none(name):
    assert spelled_out(nodes_of(OTHERS[name])[-2]) is None


def test_a_formula_whose_parts_are_read_is_none():
    *_, product, _, _ = nodes_of(lambda x: (x * (gate := torch.sigmoid(x))) + gate)
    assert product.name == "mul"
    assert spelled_out(product) is None


def test_whole_activations_are_left_to_their_names():
    assert spelled_out(nodes_of(functional.silu)[-2]) is None


def test_functions_and_modules_are_told_by_their_values():
    assert activation_of(torch.relu) == "relu"
    assert activation_of(nn.SiLU()) == "silu"
    assert activation_of(nn.GELU(approximate="tanh")) == "gelu_tanh"
    assert activation_of(lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5))) == "gelu"
    assert activation_of(torch.tanh) is None
    assert activation_of(torch.sum) is None
