"""The reference against the words of the definition, on cases small enough to work out by hand."""

import torch
from closeness import assert_equal_up_to_rounding
from torch import Tensor

from omoe import OMoEConfig
from omoe.reference import ReferenceOMoE, outside_span, owm

LR = 0.5


def sgd(expert: int, gradient: Tensor, t: int) -> Tensor:
    return -LR * gradient


def test_owm_of_a_unit_input_shrinks_that_direction_alone() -> None:
    projector = owm(torch.eye(3), torch.tensor([0.0, 1.0, 0.0]), 1.0)
    assert torch.equal(projector, torch.diag(torch.tensor([1.0, 0.5, 1.0])))


def test_outside_span_by_hand() -> None:
    step, change = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]])
    assert torch.equal(outside_span(step, [change]), torch.tensor([[3.0, 0.0]]))
    assert torch.equal(outside_span(step, [change * 0]), step)
    assert torch.equal(outside_span(step, []), step)


def test_update_space_by_hand() -> None:
    weights = [torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 1.0]])]
    reference = ReferenceOMoE(weights, sgd, 0.0, OMoEConfig())
    first, second = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    reference.step([first, second], [])
    assert torch.equal(reference.weights[0], torch.tensor([[0.0, 1.0]]))
    reference.step([first + second, first + second], [])
    assert_equal_up_to_rounding("first", reference.weights[0], torch.tensor([[-1.0, 1.0]]), roundings=4)
    assert_equal_up_to_rounding("second", reference.weights[1], torch.tensor([[1.0, -1.0]]), roundings=4)


def test_input_space_by_hand() -> None:
    weights = [torch.ones(1, 2) for _ in range(3)]
    reference = ReferenceOMoE(weights, sgd, 0.1, OMoEConfig(space="input", period=2, alpha=1.0))
    inputs = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.zeros(0, 2)]
    gradient = torch.tensor([[1.0, 1.0]])
    reference.step([gradient] * 3, inputs)
    assert_equal_up_to_rounding("accumulating", reference.weights[2], torch.full((1, 2), 0.4), roundings=4)
    assert torch.equal(reference.others_projector(2), torch.diag(torch.tensor([0.75, 0.75])))
    assert torch.equal(reference.others_projector(0), torch.diag(torch.tensor([1.0, 0.75])))
    before = reference.weights[0]
    reference.step([gradient] * 3, inputs)
    expected = before * 0.9 - LR * torch.tensor([[1.0, 0.75]])
    assert_equal_up_to_rounding("orthogonal", reference.weights[0], expected, roundings=4)


def test_product_and_output_side_by_hand() -> None:
    weights = [torch.ones(2, 1) for _ in range(3)]
    config = OMoEConfig(space="input", alpha=1.0, combine="product", side="output", period=2)
    reference = ReferenceOMoE(weights, sgd, 0.0, config)
    outputs = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 1.0]])]
    gradient = torch.ones(2, 1)
    reference.step([gradient] * 3, outputs)
    assert torch.equal(reference.others_projector(0), torch.diag(torch.tensor([1.0, 0.25])))
    before = reference.weights[0]
    reference.step([gradient] * 3, outputs)
    assert torch.equal(reference.weights[0], before - LR * torch.tensor([[1.0], [0.25]]))


def test_weights_and_gradients_by_hand() -> None:
    weights = [torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.zeros(2, 2), torch.zeros(2, 2)]
    zero, gradient = torch.zeros(2, 2), torch.tensor([[0.0, 2.0], [0.0, 0.0]])
    config = OMoEConfig(space="input", alpha=1.0, source="weights")
    reference = ReferenceOMoE(weights, sgd, 0.0, config)
    reference.step([zero, gradient, zero], [])
    assert torch.equal(reference.projectors[0], torch.diag(torch.tensor([0.5, 1.0])))
    assert torch.equal(reference.projectors[1], torch.diag(torch.tensor([1.0, 0.8])))  # of the stepped weight
    assert torch.equal(reference.projectors[2], torch.eye(2))
    config = OMoEConfig(space="input", alpha=1.0, source="gradients", side="output")
    reference = ReferenceOMoE(weights, sgd, 0.0, config)
    reference.step([zero, gradient, zero], [])
    assert torch.equal(reference.projectors[1], torch.diag(torch.tensor([0.5, 1.0])))
    assert torch.equal(reference.others_projector(0), torch.diag(torch.tensor([0.75, 1.0])))
    assert torch.equal(reference.projectors[0], torch.eye(2))
    before = reference.weights[0]
    reference.step([gradient, zero, zero], [])
    assert torch.equal(reference.weights[0], before - LR * 0.75 * gradient)
