import pytest
import torch
from closeness import assert_all_close, assert_close, assert_equal_up_to_rounding
from torch import Tensor, nn
from torch.nn import functional

from moe_pipeline import FeedForwardExperts, ModuleExperts
from moe_pipeline.experts import GroupedLinear

COUNTS = {
    "even": (4, 4, 4),
    "ragged": (1, 9, 2),
    "an empty expert": (5, 0, 7),
    "empty ends": (0, 12, 0),
    "no rows": (0, 0, 0),
}
ACTIVATIONS = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
}


def _loop(experts: FeedForwardExperts, rows_RM: Tensor, counts: tuple[int, ...], activation: str) -> Tensor:
    """The same experts as plain linear maps, one after the other."""
    results, start = [], 0
    for e, count in enumerate(counts):
        rows = rows_RM[start : start + count]
        start += count
        bias = (None, None) if experts.up.bias is None else (experts.up.bias[e], experts.down.bias[e])
        hidden = functional.linear(rows, experts.up.weight[e], bias[0])
        if experts.gated:
            gate, linear = hidden.split(hidden.shape[-1] // 2, dim=-1)
            hidden = ACTIVATIONS[activation](gate) * linear
        else:
            hidden = ACTIVATIONS[activation](hidden)
        results.append(functional.linear(hidden, experts.down.weight[e], bias[1]))
    return torch.cat(results)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("activation", "gated", "bias"),
    [("relu", False, True), ("gelu", False, False), ("gelu_tanh", True, True), ("silu", True, False)],
)
def test_results_and_gradients_equal_plain_linear_maps(
    counts: tuple[int, ...], dtype: torch.dtype, activation: str, gated: bool, bias: bool
) -> None:
    rows_RM, grad_RM = torch.randn(sum(counts), 6).to(dtype), torch.randn(sum(counts), 6).to(dtype)
    torch.manual_seed(1)
    experts = FeedForwardExperts(3, 6, 10, activation=activation, gated=gated, bias=bias).to(dtype)

    def run(to: torch.dtype, *, fast: bool) -> dict[str, Tensor]:
        experts.to(to).zero_grad()
        leaf_RM = rows_RM.to(to, copy=True).requires_grad_()
        out_RM = experts(leaf_RM, counts) if fast else _loop(experts, leaf_RM, counts, activation)
        out_RM.backward(grad_RM.to(to))
        gradients = {name: parameter.grad.clone() for name, parameter in experts.named_parameters()}
        return {"out": out_RM.detach(), "rows": leaf_RM.grad, **gradients}

    actual, reference, truth = run(dtype, fast=True), run(dtype, fast=False), run(torch.float64, fast=False)
    assert_all_close(actual, reference, truth)


def test_autocast_computes_in_its_dtype_and_accumulates_in_the_parameters() -> None:
    experts, rows_RM = FeedForwardExperts(3, 6, 10), torch.randn(12, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out_RM = experts(rows_RM, (5, 0, 7))
    out_RM.float().square().sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in experts.named_parameters()}
    experts.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reference_RM = _loop(experts, rows_RM, (5, 0, 7), "relu")
    reference_RM.float().square().sum().backward()
    references = {name: parameter.grad.clone() for name, parameter in experts.named_parameters()}
    experts.double().zero_grad()
    truth_RM = _loop(experts, rows_RM.double(), (5, 0, 7), "relu")
    truth_RM.square().sum().backward()
    truths = {name: parameter.grad for name, parameter in experts.named_parameters()}
    assert_close("out", out_RM, reference_RM, truth_RM)
    assert_all_close(gradients, references, truths)


def test_gradients_are_numerically_right_and_frozen_parameters_get_none() -> None:
    linear = GroupedLinear(3, 4, 2).double()
    rows_RI = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)

    def run(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(linear, {"weight": weight, "bias": bias}, (rows, (2, 0, 4)))

    assert torch.autograd.gradcheck(run, (rows_RI, linear.weight, linear.bias))
    linear.weight.requires_grad_(False)
    linear(rows_RI, (2, 0, 4)).sum().backward()
    assert linear.weight.grad is None
    assert linear.bias.grad.tolist() == [[2, 2], [0, 0], [4, 4]]


def test_repeats_bitwise() -> None:
    experts, rows_RM = FeedForwardExperts(3, 6, 10), torch.randn(12, 6)
    assert torch.equal(experts(rows_RM, (5, 0, 7)), experts(rows_RM, (5, 0, 7)))


def test_starts_as_linear_maps_do() -> None:
    """Same distribution: uniform up to one over the root of the inputs."""
    linear = GroupedLinear(8, 64, 32)
    for parameter in (linear.weight, linear.bias):
        assert parameter.abs().max() <= 1 / 8
        assert parameter.abs().max() > 0.95 / 8


def test_dropout_drops_hidden_values_in_training_only() -> None:
    experts, rows_RM = FeedForwardExperts(2, 4, 8, dropout=1.0), torch.randn(6, 4)
    assert torch.equal(experts(rows_RM, (3, 3)), experts.down.bias.repeat_interleave(3, 0))
    assert not torch.equal(experts.eval()(rows_RM, (3, 3)), experts.down.bias.repeat_interleave(3, 0))


def test_hooks_see_rows_and_counts() -> None:
    seen: list[tuple[torch.Size, tuple[int, ...]]] = []
    experts = FeedForwardExperts(2, 4, 8)
    for linear in (experts.up, experts.down):
        linear.register_forward_hook(lambda module, args, output: seen.append((args[0].shape, args[1])))
    experts(torch.randn(6, 4), (2, 4))
    assert seen == [((6, 4), (2, 4)), ((6, 8), (2, 4))]
    names = {name: tuple(parameter.shape) for name, parameter in experts.named_parameters()}
    assert names == {"up.weight": (2, 8, 4), "up.bias": (2, 8), "down.weight": (2, 4, 8), "down.bias": (2, 4)}


def test_activation_may_be_a_module_with_parameters() -> None:
    activation = nn.PReLU()
    experts = FeedForwardExperts(2, 4, 8, activation=activation)
    experts(torch.randn(6, 4), (2, 4)).sum().backward()
    assert activation.weight.grad is not None
    assert "activation.weight" in experts.state_dict()


def test_modules_as_experts() -> None:
    modules = [nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 4)), nn.Identity()]
    experts, rows_RM = ModuleExperts(modules), torch.randn(6, 4)
    out_RM = experts(rows_RM, (4, 0, 2))
    assert_equal_up_to_rounding("first", out_RM[:4], modules[0](rows_RM[:4]), roundings=0)
    assert torch.equal(out_RM[4:], rows_RM[4:])
    out_RM.sum().backward()
    assert modules[1][0].weight.grad.abs().sum() == 0  # without rows, yet with a gradient: every rank has the same ones


@pytest.mark.parametrize("counts", [(6,), (3, 2), (3, 3, 0)])
def test_refuses_counts_that_do_not_fit(counts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="counts: got"):
        GroupedLinear(2, 4, 4)(torch.randn(6, 4), counts)


def test_refuses_unknown_activations_and_no_modules() -> None:
    with pytest.raises(ValueError, match=r"activation: got 'swoosh'.*relu"):
        FeedForwardExperts(2, 4, 8, activation="swoosh")
    with pytest.raises(ValueError, match="experts: got an empty sequence"):
        ModuleExperts([])
