import pytest
import torch
from closeness import assert_close, assert_equal_up_to_rounding
from torch import Tensor, nn

from omoe import find_expert_linears
from omoe.base_step import base_step_EOI, decay_share
from omoe.experts import expert_weights
from tests.omoe.small_moe import SmallMoE, batches, loss_of

LR, DECAY = 0.1, 0.5


class Unmarked(torch.optim.Optimizer):
    def __init__(self, params: list[nn.Parameter], **defaults: object) -> None:
        super().__init__(params, {"lr": LR, **defaults})


@pytest.mark.parametrize(
    ("make", "share"),
    [
        (lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=DECAY), LR * DECAY),
        (lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.25), weight_decay=DECAY), 0.25 * DECAY),
        (lambda p: torch.optim.Adam(p, lr=LR, weight_decay=DECAY), 0.0),
        (lambda p: torch.optim.RAdam(p, lr=LR, weight_decay=DECAY, decoupled_weight_decay=True), LR * DECAY),
        (lambda p: torch.optim.SGD(p, lr=LR, weight_decay=DECAY), 0.0),
        (lambda p: torch.optim.Muon(p, lr=LR, weight_decay=DECAY), LR * DECAY),
        (lambda p: torch.optim.Adafactor(p, lr=LR, weight_decay=DECAY), LR * DECAY),
        (lambda p: torch.optim.LBFGS(p, lr=LR), 0.0),
        (lambda p: Unmarked(p, weight_decay=0.0), 0.0),
        (lambda p: Unmarked(p), 0.0),
        (lambda p: Unmarked(p, weight_decay=DECAY, decoupled_weight_decay=True), LR * DECAY),
        (lambda p: Unmarked(p, weight_decay=DECAY, decoupled_weight_decay=False), 0.0),
    ],
)
def test_share_that_decoupled_decay_takes(make: object, share: float) -> None:
    base = make([nn.Parameter(torch.ones(2, 2))])  # type: ignore[operator]
    assert decay_share(base, base.param_groups[0]) == share


def test_unknown_kind_of_decay_is_refused() -> None:
    base = Unmarked([nn.Parameter(torch.ones(2, 2))], weight_decay=DECAY)
    with pytest.raises(ValueError, match=r"base: Unmarked has weight_decay=0.5.*'decoupled_weight_decay'"):
        decay_share(base, base.param_groups[0])


@pytest.mark.parametrize("optimizer", [torch.optim.Muon, torch.optim.Adafactor, torch.optim.AdamW])
def test_what_is_taken_for_decoupled_decay_is_what_the_optimizer_does(optimizer: type[torch.optim.Optimizer]) -> None:
    parameter = nn.Parameter(torch.randn(3, 3))
    start = parameter.detach().clone()
    parameter.grad = torch.zeros(3, 3)
    base = optimizer([parameter], lr=LR, weight_decay=DECAY)  # type: ignore[call-arg]
    base.step()
    expected = start * (1 - decay_share(base, base.param_groups[0]))
    assert_equal_up_to_rounding("decayed", parameter.detach(), expected, roundings=2)


def step_of(dtype: torch.dtype, weight_decay: float, *, listed: bool) -> tuple[SmallMoE, Tensor]:
    torch.manual_seed(0)
    model = SmallMoE(listed=listed).to(dtype)
    x_TM, expert_T, target = batches(1)[0]
    loss_of(model, (x_TM.to(dtype), expert_T, target.to(dtype))).backward()
    linear = find_expert_linears(model)[0]
    before_EOI = torch.stack(expert_weights(linear))
    base = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=weight_decay)
    base.step()
    return model, base_step_EOI(linear, before_EOI, [LR * weight_decay] * len(linear.parameters))


@pytest.mark.parametrize("listed", [False, True])
def test_decay_is_not_part_of_the_step(listed: bool) -> None:
    plain = step_of(torch.float32, 0.0, listed=listed)[1]
    truth = step_of(torch.float64, 0.0, listed=listed)[1]
    assert_close("step", step_of(torch.float32, DECAY, listed=listed)[1], plain, truth)


def test_low_precision_steps_are_what_was_added() -> None:
    torch.manual_seed(0)
    _, step_EOI = step_of(torch.bfloat16, DECAY, listed=False)
    assert step_EOI.dtype == torch.float32
    largest = step_EOI.abs().max()[None].bfloat16()  # Adam's first step has the size of its rate
    assert_equal_up_to_rounding("largest", largest, torch.full((1,), LR, dtype=torch.bfloat16), roundings=32)


def test_an_expert_without_gradient_was_not_stepped() -> None:
    model = SmallMoE(listed=True)
    linear = find_expert_linears(model)[0]
    x_TM = torch.randn(6, 6)
    loss_of(model, (x_TM, torch.tensor([0, 0, 1, 1, 3, 3]), torch.zeros(6, 1))).backward()
    before_EOI = torch.stack(expert_weights(linear))
    torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY).step()
    step_EOI = base_step_EOI(linear, before_EOI, [LR * DECAY] * 4)
    assert (step_EOI.flatten(1).norm(dim=1) > 0).tolist() == [True, True, False, True]
