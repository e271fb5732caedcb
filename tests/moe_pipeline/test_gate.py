import pytest
import torch
from closeness import assert_all_close, assert_equal_up_to_rounding
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_pipeline import Gate, GateConfig
from moe_pipeline.gate import Assignment, assign
from moe_pipeline.reference import Entry, kept_entries

CONFIGS = {
    "top-1": GateConfig(num_experts=5, top_k=1, normalize=False),
    "top-3": GateConfig(num_experts=5, top_k=3),
    "all experts": GateConfig(num_experts=5, top_k=5),
    "raw weights": GateConfig(num_experts=5, top_k=2, normalize=False),
    "capacity": GateConfig(num_experts=5, top_k=3, capacity_factor=0.5),
    "switch": GateConfig(num_experts=5, top_k=1, kind="switch"),
    "switch with capacity": GateConfig(num_experts=5, top_k=1, kind="switch", capacity_factor=0.8),
    "gshard": GateConfig(num_experts=5, kind="gshard", capacity_factor=0.7),
    "expert choice": GateConfig(num_experts=5, kind="expert_choice", capacity_factor=1.0),
    "expert choice of all": GateConfig(num_experts=5, kind="expert_choice", capacity_factor=9.0),
    "one expert": GateConfig(num_experts=1, top_k=1),
}


def _dense(assignment: Assignment | list[Entry], num_tokens: int, num_experts: int) -> Tensor:
    """The assignment as a table of weights; an entry given twice would show."""
    if isinstance(assignment, Assignment):
        places = (assignment.token_A, assignment.expert_A)
        weights = assignment.weight_A
    else:
        places = tuple(torch.tensor([[e.token, e.expert] for e in assignment]).reshape(-1, 2).unbind(1))
        weights = torch.stack([entry.weight for entry in assignment])
    return weights.new_zeros(num_tokens, num_experts).index_put(places, weights, accumulate=True)


@pytest.mark.parametrize("num_tokens", [1, 2, 23])
@pytest.mark.parametrize("name", CONFIGS)
def test_weights_and_gradients_equal_the_reference(name: str, num_tokens: int) -> None:
    config = CONFIGS[name]
    shape = num_tokens, config.num_experts
    logits_TE, grad_TE, draw_T = torch.randn(shape), torch.randn(shape), torch.rand(num_tokens)
    draw_T = draw_T if config.kind == "gshard" else None

    def run(dtype: torch.dtype, *, fast: bool) -> dict[str, Tensor]:
        leaf_TE = logits_TE.to(dtype, copy=True).requires_grad_()
        draws = None if draw_T is None else draw_T.tolist()
        entries = assign(leaf_TE, config=config, draw_T=draw_T) if fast else kept_entries(leaf_TE, config, draws=draws)
        weight_TE = _dense(entries, *shape)
        (weight_TE * grad_TE.to(dtype)).sum().backward()
        return {"weights": weight_TE.detach(), "gradient": leaf_TE.grad + 1}  # a gradient may cancel to nothing

    actual, reference, truth = (
        run(torch.float32, fast=True),
        run(torch.float32, fast=False),
        run(torch.float64, fast=False),
    )
    assert torch.equal(actual["weights"] != 0, truth["weights"] != 0)
    assert_all_close(actual, reference, truth)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 40), st.integers(1, 9), st.data())
def test_dropless_weights_sum_to_one_and_experts_differ(num_tokens: int, num_experts: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(min(2, num_experts), num_experts))
    gate = Gate(GateConfig(num_experts=num_experts, top_k=top_k), 3)
    assignment = gate(torch.randn(num_tokens, 3))
    weight_TE = _dense(assignment, num_tokens, num_experts)
    assert ((weight_TE > 0).sum(1) == top_k).all()
    assert_equal_up_to_rounding("sum", weight_TE.sum(1), torch.ones(num_tokens), roundings=top_k + 1)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 40), st.floats(0.1, 2.0), st.sampled_from(["top_k", "switch", "gshard", "expert_choice"]))
def test_no_expert_exceeds_its_capacity(num_tokens: int, factor: float, kind: str) -> None:
    config = GateConfig(num_experts=4, top_k=1 if kind == "switch" else 2, kind=kind, capacity_factor=factor)
    assignment = Gate(config, 3)(torch.randn(num_tokens, 3))
    rows_E = torch.bincount(assignment.expert_A, minlength=4)
    assert (rows_E <= config.capacity_rows(num_tokens)).all()
    assert len(assignment.token_A) <= assignment.num_chosen
    if kind == "expert_choice":
        assert len(set(rows_E.tolist())) == 1


def test_capacity_serves_first_choices_in_token_order() -> None:
    logits_TE = torch.tensor([[1.0, 2.0], [2.0, 1.0], [2.0, 1.0]])
    assignment = assign(logits_TE, config=GateConfig(num_experts=2, capacity_factor=2 / 3))
    assert list(zip(assignment.token_A.tolist(), assignment.expert_A.tolist(), strict=True)) == [
        (0, 1),
        (1, 0),
        (2, 0),
        (1, 1),
    ]
    assert assignment.num_chosen == 6


def test_gshard_keeps_a_second_expert_by_twice_its_weight() -> None:
    config = GateConfig(num_experts=3, kind="gshard", capacity_factor=9.0)
    logits_TE = torch.tensor([[0.75, 0.25, 1e-9]]).log().repeat(2000, 1)
    kept = assign(logits_TE, config=config, draw_T=torch.linspace(0, 1, 2001)[:-1])
    assert (kept.expert_A == 1).sum() in (999, 1000, 1001)  # the draw at exactly one half may round either way
    assert (kept.expert_A == 0).sum() == 2000
    assert len(assign(logits_TE, config=config).token_A) == 4000
    gate = Gate(config, 3)
    x_TM = torch.randn(400, 3)
    assert len(gate.eval()(x_TM).token_A) == 800
    gate.router.weight.data *= 500  # now the second expert's weight is often small
    assert 400 < len(gate.train()(x_TM).token_A) < 800


@pytest.mark.parametrize("name", CONFIGS)
def test_masked_tokens_are_as_if_absent(name: str) -> None:
    gate = Gate(CONFIGS[name], 3).eval()
    x_TM = torch.randn(20, 3, requires_grad=True)
    mask_T = torch.rand(20) < 0.6
    masked, alone = gate(x_TM, mask_T=mask_T), gate(x_TM[mask_T])
    assert torch.equal(masked.token_A, mask_T.nonzero().squeeze(1)[alone.token_A])
    assert torch.equal(masked.expert_A, alone.expert_A)
    assert torch.equal(masked.weight_A, alone.weight_A)
    assert masked.num_chosen == alone.num_chosen
    for loss in ("balance", "z", "importance"):
        assert torch.equal(getattr(masked.losses, loss), getattr(alone.losses, loss))
    (gradient_TM,) = torch.autograd.grad(masked.losses.z + masked.weight_A.square().sum(), x_TM)
    assert (gradient_TM[~mask_T] == 0).all()
    nothing = gate(x_TM, mask_T=torch.zeros(20, dtype=torch.bool))
    assert len(nothing.token_A) == 0
    assert nothing.losses.z == 0


@pytest.mark.parametrize(
    "config",
    [
        GateConfig(num_experts=5, noise="gaussian", noise_std=1.0),
        GateConfig(num_experts=5, noise="jitter", noise_std=0.5),
        GateConfig(num_experts=5, noise="learned", importance_weight=1.0),
    ],
    ids=lambda config: config.noise,
)
def test_noise_is_for_training_only(config: GateConfig) -> None:
    gate, x_TM = Gate(config, 6), torch.randn(50, 6)
    first, second = gate(x_TM), gate(x_TM)
    assert not torch.equal(first.weight_A, second.weight_A)
    torch.manual_seed(3)
    again = gate(x_TM).weight_A
    torch.manual_seed(3)
    assert torch.equal(again, gate(x_TM).weight_A)
    gate.eval()
    before = torch.get_rng_state()
    assert torch.equal(gate(x_TM).weight_A, gate(x_TM).weight_A)
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_has_the_size_it_says() -> None:
    x_TM = torch.ones(40_000, 1)
    for config, expected in (
        (GateConfig(num_experts=1, top_k=1, noise="gaussian", noise_std=0.3), 0.3),
        (GateConfig(num_experts=1, top_k=1, noise="jitter", noise_std=0.3), 0.3 / 3**0.5),
        (GateConfig(num_experts=1, top_k=1, noise="learned"), torch.tensor(2.0).log().item() + 1e-2),
    ):
        gate = Gate(config, 1)
        gate.router.weight.data.fill_(10.0 if config.noise != "jitter" else 1.0)
        shift = gate.router.weight.item()
        variance = gate(x_TM).losses.z.item() - shift**2  # one expert: z is the mean of the squared logit
        spread_of_estimate = 6 * (2 * shift * expected + 2 * expected**2) / 40_000**0.5
        assert abs(variance - expected**2) < spread_of_estimate


def test_learned_noise_learns_through_the_loads() -> None:
    config = GateConfig(num_experts=5, noise="learned")
    logits_TE, load_E = torch.randn(50, 5), torch.tensor([1.0, 3.0, 1.0, 3.0, 2.0], requires_grad=True)
    with_load = assign(logits_TE, config=config, load_E=load_E).losses.importance
    without = assign(logits_TE, config=config).losses.importance
    assert_equal_up_to_rounding("importance", with_load, without + 0.8 / 4, roundings=8)
    assert torch.autograd.grad(with_load, load_E)[0].abs().sum() > 0
    gate = Gate(GateConfig(num_experts=5, noise="learned", importance_weight=1.0), 6)
    gate(torch.randn(50, 6)).losses.importance.backward()
    assert gate.noise.weight.grad.abs().sum() > 0
    assert gate.router.weight.grad.abs().sum() > 0


def test_the_router_runs_in_float32_under_autocast() -> None:
    gate, x_TM = Gate(GateConfig(num_experts=5), 6), torch.randn(50, 6)
    plain = gate(x_TM)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = gate(x_TM)
    assert torch.equal(plain.weight_A, cast.weight_A)
    assert gate.bfloat16()(x_TM.bfloat16()).weight_A.dtype == torch.float32
    assert gate.double()(x_TM.double()).weight_A.dtype == torch.float64


def test_a_new_router_is_small_yet_tells_tokens_apart() -> None:
    gate = Gate(GateConfig(num_experts=8), 256)
    assert 0.018 < gate.router.weight.std() < 0.022
    assert len(gate(torch.randn(64, 256)).expert_A.unique()) == 8
