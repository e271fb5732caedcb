import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from scripts.testbed.quick_dropout import dropout, quick_dropout


@pytest.mark.parametrize("shape", [(3, 5, 7), (1,), (0, 4)])
def test_keeps_scales_and_zeroes_and_the_gradient_follows(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape).requires_grad_()
    y = dropout(x, 0.25)
    kept = y != 0
    assert torch.equal(y, torch.where(kept, x * (1 / 0.75), 0.0))
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.where(kept, torch.tensor(1 / 0.75), torch.tensor(0.0)))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_drops_the_share_it_should(p: float) -> None:
    torch.manual_seed(1)
    count = 200_000
    share = (dropout(torch.ones(count), p) == 0).double().mean().item()
    assert abs(share - p) < 5 * (p * (1 - p) / count) ** 0.5


def test_does_nothing_where_there_is_nothing_to_do_and_leaves_the_random_stream_alone() -> None:
    x, state = torch.randn(4), torch.get_rng_state()
    assert dropout(x, 0.3, training=False) is x
    assert dropout(x, 0.0) is x
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match=r"p: got 1.0"):
        dropout(x, 1.0)


def test_is_used_by_modules_inside_the_block_only() -> None:
    module, x, torchs = nn.Dropout(0.4), torch.ones(1000), F.dropout
    with quick_dropout(enabled=True):
        torch.manual_seed(2)
        inside = module(x)
    torch.manual_seed(2)
    assert torch.equal(inside, dropout(x, 0.4))
    assert F.dropout is torchs
    with pytest.raises(RuntimeError, match="stop"), quick_dropout(enabled=True):
        raise RuntimeError("stop")
    assert F.dropout is torchs
    with quick_dropout(enabled=False):
        assert F.dropout is torchs
