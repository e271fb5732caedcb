import functools

import torch
from torch import nn

from fusion.graph.outside import outside_tensors

SCALE = torch.tensor(2.0)
LAYER = nn.Linear(3, 2)


def named(x):
    return LAYER(x) * SCALE


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("mask", torch.ones(2))

    def forward(self, x):
        return self.layer(x) * self.mask


def ids(tensors):
    return {id(tensor) for tensor in tensors}


def test_a_module_has_parameters_and_buffers():
    model = Model()
    expected = ids([*model.parameters(), model.mask])
    assert ids(outside_tensors(model, ())) == expected
    assert ids(outside_tensors(model.forward, ())) == expected
    assert ids(outside_tensors(Model.forward, (model, torch.ones(3)))) == expected
    assert ids(outside_tensors(lambda x: model(x), ())) == expected


def test_a_function_has_what_it_closes_over_and_names():
    weight = torch.ones(3)
    assert ids(outside_tensors(lambda x: x * weight, ())) == {id(weight)}
    assert ids(outside_tensors(named, ())) == ids([*LAYER.parameters(), SCALE])


def test_a_parameter_that_is_replaced_is_another():
    model = Model()
    before = ids(outside_tensors(model, ()))
    kept = model.layer.weight
    model.layer.weight = nn.Parameter(kept.detach().clone())
    assert ids(outside_tensors(model, ())) != before


def test_nothing_comes_of_nothing():
    assert outside_tensors(torch.relu, ()) == ()
    assert outside_tensors(functools.partial(torch.relu), (1, "text", torch.ones(2))) == ()

    def unbound(x):
        return x * later

    assert outside_tensors(unbound, ()) == ()
    later = torch.ones(2)
    assert ids(outside_tensors(unbound, ())) == {id(later)}
