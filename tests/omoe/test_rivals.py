import pytest
import torch
from closeness import assert_equal_up_to_rounding
from torch import Tensor

from omoe.rivals import output_orthogonality, router_similarity, weight_orthogonality


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b) / (a.norm() * b.norm())


def test_outputs_by_loop() -> None:
    output_ETM = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    squares = [
        cosine(output_ETM[i, t], output_ETM[j, t]) ** 2 for i in range(3) for j in range(3) if i != j for t in range(4)
    ]
    assert_equal_up_to_rounding("loss", output_orthogonality(output_ETM), torch.stack(squares).mean(), roundings=64)


def test_weights_by_loop() -> None:
    weight_EOI = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    squares = [
        cosine(weight_EOI[i].flatten(), weight_EOI[j].flatten()) ** 2 for i in range(3) for j in range(3) if i != j
    ]
    assert_equal_up_to_rounding("loss", weight_orthogonality(weight_EOI), torch.stack(squares).mean(), roundings=64)


def test_copies_cost_most_and_orthogonal_experts_nothing() -> None:
    row_M = torch.randn(6, generator=torch.Generator().manual_seed(2))
    assert_equal_up_to_rounding("copies", output_orthogonality(row_M.expand(3, 2, 6)), torch.tensor(1.0), roundings=16)
    apart_ETM = torch.eye(3)[:, None].expand(3, 2, 3)
    assert output_orthogonality(apart_ETM) == 0
    assert weight_orthogonality(torch.eye(4).view(2, 2, 4)[:, :1]) == 0
    assert router_similarity(torch.eye(3)) == 0


def test_a_router_by_hand() -> None:
    assert router_similarity(torch.tensor([[1.0, 1.0], [0.0, 2.0]])) == 1 + 2 + 2 + 3


@pytest.mark.parametrize("loss", [output_orthogonality, weight_orthogonality])
def test_a_step_along_the_gradient_sets_experts_apart(loss) -> None:  # type: ignore[no-untyped-def]
    value = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(3)).requires_grad_()
    before = loss(value)
    (gradient,) = torch.autograd.grad(before, value)
    assert loss(value - 0.1 * gradient) < before


def test_one_expert_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        weight_orthogonality(torch.ones(1, 2, 2))
