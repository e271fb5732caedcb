import math

import pytest
import torch
from closeness import assert_all_close, assert_close
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bliss import reference
from bliss.losses import position_loss, position_targets, sequence_loss, token_loss

LABELS = torch.tensor([[3, 0, 6, -100], [-100, -100, 1, 2], [-100] * 4])


def with_gradient(loss: object, logits: Tensor) -> dict[str, Tensor]:
    logits = logits.clone().requires_grad_()
    value = loss(logits)  # type: ignore[operator]
    value.backward()
    assert logits.grad is not None
    return {"loss": value.detach(), "gradient": logits.grad}


def compare(loss: object, loops: object, logits: Tensor) -> None:
    truth = with_gradient(loops, logits.double())
    assert_all_close(with_gradient(loss, logits), with_gradient(loops, logits), truth)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_sequence_loss_equals_the_reference(smoothing: float) -> None:
    def loops(logits_BTV: Tensor) -> Tensor:
        pairs = zip(logits_BTV, LABELS.tolist(), strict=True)
        return sum(reference.sequence_loss(logits, labels, label_smoothing=smoothing) for logits, labels in pairs) / 5

    compare(lambda z: sequence_loss(z, LABELS, label_smoothing=smoothing), loops, torch.randn(3, 4, 7))


@pytest.mark.parametrize("targets", [[2, 2, 0, 6], [5]])
def test_token_loss_equals_the_reference(targets: list[int]) -> None:

    def loops(logits_RV: Tensor) -> Tensor:
        pairs = zip(logits_RV, targets, strict=True)
        return -sum(logits.log_softmax(0)[target] for logits, target in pairs) / len(targets)

    compare(lambda z: token_loss(z, torch.tensor(targets)), loops, torch.randn(len(targets), 7))


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 2.0])
def test_position_loss_equals_the_reference(temperature: float) -> None:
    displacement = torch.tensor([0, 1, -1, 3, -9, 9])
    choices = {"max_displacement": 3, "temperature": temperature}

    def loops(logits_ND: Tensor) -> Tensor:
        pairs = zip(logits_ND, displacement.tolist(), strict=True)
        return sum(reference.position_loss(logits, d, **choices) for logits, d in pairs) / 6  # type: ignore[arg-type]

    compare(lambda z: position_loss(z, displacement, **choices), loops, torch.randn(6, 7))  # type: ignore[arg-type]


@given(st.integers(-20, 20), st.integers(1, 12), st.floats(0.01, 10))
def test_position_target_is_a_distribution_that_decays_with_distance(d: int, most: int, temperature: float) -> None:
    target_D = position_targets(torch.tensor([d]), max_displacement=most, temperature=temperature)[0]
    expected = torch.tensor(
        reference.position_target(d, max_displacement=most, temperature=temperature), dtype=torch.float64
    )
    assert_close("target", target_D, expected.float(), expected)
    centre = min(max(d, -most), most) + most
    assert target_D.argmax() == centre
    assert (target_D[centre:].diff() <= 0).all()
    assert (target_D[: centre + 1].diff() >= 0).all()


@given(st.integers(-5, 5))
def test_cold_targets_are_one_hot(d: int) -> None:
    displacement = torch.tensor([d])
    cold = position_targets(displacement, max_displacement=3, temperature=0.0)
    assert torch.equal(cold, torch.nn.functional.one_hot(displacement.clamp(-3, 3) + 3, 7).float())
    for temperature in (1e-3, 1e-300):  # the limit of tau -> 0
        assert torch.equal(position_targets(displacement, max_displacement=3, temperature=temperature), cold)


def test_no_slot_gives_zero_with_a_gradient() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    ignored = torch.full((2, 3), -100)
    for loss, shape in (
        (lambda z: sequence_loss(z, ignored, label_smoothing=0.1), (2, 3, 7)),
        (lambda z: token_loss(z, nothing), (0, 7)),
        (lambda z: position_loss(z, nothing, max_displacement=3, temperature=1.0), (0, 7)),
    ):
        results = with_gradient(loss, torch.randn(shape))
        assert results["loss"] == 0
        assert not results["gradient"].any()


def test_low_precision_logits_are_summed_in_float32() -> None:
    logits = torch.randn(50, 4, 300).bfloat16()
    labels = torch.randint(0, 300, (50, 4))
    truth = sequence_loss(logits.double().float(), labels, label_smoothing=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = sequence_loss(logits, labels, label_smoothing=0.1)
    assert loss.dtype == torch.float32
    assert loss == truth
    assert math.isfinite(loss.item())
