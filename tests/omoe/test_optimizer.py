import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from closeness import assert_all_close, assert_close, assert_equal_up_to_rounding
from ranks import run_ranks
from torch import Tensor, nn
from torch.optim import Optimizer

from omoe import ExpertLinear, OMoE, OMoEConfig, find_expert_linears
from omoe.experts import expert_weights, select_linears
from omoe.inputs import MeanInputs
from omoe.reference import ReferenceOMoE, outside_span, owm
from tests.omoe.small_moe import NUM_EXPERTS, SmallMoE, batches, loss_of

LR, DECAY = 0.02, 0.1
Make = Callable[[Any], Optimizer]
Batch = tuple[Tensor, Tensor, Tensor]

BASES: dict[str, Make] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=LR, weight_decay=DECAY),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=LR, momentum=0.9),
}
CONFIGS = {
    "update": OMoEConfig(),
    "update-cycles": OMoEConfig(period=2, first_orthogonal_step=1),
    "mean": OMoEConfig(space="input", alpha=1.0),
    "load": OMoEConfig(space="input", alpha=1.0, combine="load"),
    "union": OMoEConfig(space="input", alpha=1.0, combine="union"),
    "product": OMoEConfig(space="input", alpha=1.0, combine="product"),
    "output": OMoEConfig(space="input", alpha=1.0, side="output"),
    "decayed-alpha": OMoEConfig(space="input", alpha=1.0, alpha_decay=1e-2, alpha_steps=4),
    "input-cycles": OMoEConfig(space="input", alpha=1.0, period=2, refresh_in_orthogonal=False),
    "forgetting": OMoEConfig(space="input", alpha=1.0, forgetting=0.8),
    "gradient": OMoEConfig(projects="gradient"),
    "gradient-input": OMoEConfig(space="input", alpha=1.0, projects="gradient", period=2),
    "low-rank": OMoEConfig(space="input", alpha=1.0, rank=16),
    "product-low-rank": OMoEConfig(space="input", alpha=1.0, rank=16, combine="product"),
    "output-low-rank": OMoEConfig(
        space="input", alpha=1.0, rank=16, side="output", combine="load", alpha_decay=0.1, alpha_steps=3
    ),
    "output-union": OMoEConfig(space="input", alpha=1.0, side="output", combine="union"),
    "output-gradient": OMoEConfig(space="input", alpha=1.0, side="output", projects="gradient"),
    "weights": OMoEConfig(space="input", alpha=0.01, source="weights"),
    "weights-output": OMoEConfig(space="input", alpha=0.01, source="weights", side="output", combine="union", rank=24),
    "gradients": OMoEConfig(space="input", alpha=1e-4, source="gradients", period=2, refresh_in_orthogonal=False),
    "gradients-output": OMoEConfig(
        space="input", alpha=1e-4, source="gradients", side="output", combine="product", projects="gradient"
    ),
    "input-down": OMoEConfig(space="input", alpha=1.0, linears="down"),
}


def small(*, listed: bool = False, dtype: torch.dtype = torch.float32) -> SmallMoE:
    torch.manual_seed(3)
    return SmallMoE(listed=listed).to(dtype)


def wrapped(model: nn.Module, config: OMoEConfig, base: str = "adamw") -> OMoE:
    return OMoE(BASES[base](model.parameters()), find_expert_linears(model), config)


def cast(batch: Batch, dtype: torch.dtype) -> Batch:
    return batch[0].to(dtype), batch[1], batch[2].to(dtype)


def train(model: SmallMoE, optimizer: Optimizer, data: list[Batch]) -> None:
    for batch in data:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# Equality with the reference


def reference_adamw() -> Callable[[int, Tensor, int], Tensor]:
    first: dict[int, Tensor] = {}
    second: dict[int, Tensor] = {}

    def step(expert: int, gradient: Tensor, t: int) -> Tensor:
        first[expert] = 0.9 * first.get(expert, torch.zeros_like(gradient)) + 0.1 * gradient
        second[expert] = 0.999 * second.get(expert, torch.zeros_like(gradient)) + 0.001 * gradient**2
        mean, variance = first[expert] / (1 - 0.9 ** (t + 1)), second[expert] / (1 - 0.999 ** (t + 1))
        return -LR * mean / (variance.sqrt() + 1e-8)

    return step


def reference_sgd() -> Callable[[int, Tensor, int], Tensor]:
    momentum: dict[int, Tensor] = {}

    def step(expert: int, gradient: Tensor, t: int) -> Tensor:
        momentum[expert] = 0.9 * momentum.get(expert, torch.zeros_like(gradient)) + gradient
        return -LR * momentum[expert]

    return step


def by_reference(config: OMoEConfig, base: str, data: list[Batch], dtype: torch.dtype) -> dict[str, Tensor]:
    """The experts' weights after training a model whose experts' steps are the reference's."""
    model = small(dtype=dtype)
    linears = find_expert_linears(model)
    kept = {linear.name for linear in select_linears(linears, config.linears)}
    unprojected = OMoEConfig(first_orthogonal_step=10**6)
    references = {
        linear.name: ReferenceOMoE(
            expert_weights(linear),
            reference_adamw() if base == "adamw" else reference_sgd(),
            LR * DECAY if base == "adamw" else 0.0,
            config if linear.name in kept else unprojected,
        )
        for linear in linears
    }
    head = BASES[base](model.head.parameters())
    for batch in data:
        seen: dict[str, tuple[Tensor, ...]] = {}
        hooks = [
            linear.modules[0].register_forward_hook(
                lambda module, inputs, output, name=linear.name, seen=seen: seen.update(
                    {name: (inputs[0] if config.side == "input" else output).detach().split(inputs[1])}
                )
            )
            for linear in linears
        ]
        model.zero_grad()
        loss_of(model, cast(batch, dtype)).backward()
        for hook in hooks:
            hook.remove()
        head.step()
        for linear in linears:
            references[linear.name].step(list(linear.parameters[0].grad), seen[linear.name])  # type: ignore[arg-type]
            linear.parameters[0].data.copy_(torch.stack(references[linear.name].weights))
    return weights(model)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_equals_the_reference(config: OMoEConfig, base: str) -> None:
    data = batches(5)
    model = small()
    train(model, wrapped(model, config, base), data)
    reference, truth = (by_reference(config, base, data, dtype) for dtype in (torch.float32, torch.float64))
    assert_all_close(weights(model), reference, truth)
    plain = small()
    train(plain, BASES[base](plain.parameters()), data)
    assert not torch.equal(plain.experts.down.weight, model.experts.down.weight)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_listed_experts_equal_stacked_ones(config: OMoEConfig) -> None:
    results = {}
    for listed in (False, True):
        for dtype in (torch.float32, torch.float64):
            model = small(listed=listed, dtype=dtype)
            train(model, wrapped(model, config), [cast(batch, dtype) for batch in batches(4)])
            results[listed, dtype] = {
                linear.name: torch.stack(expert_weights(linear)) for linear in find_expert_linears(model)
            }
    single, double = torch.float32, torch.float64
    assert_all_close(results[True, single], results[False, single], results[False, double])


# What must not change


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("space", ["update", "input"])
@pytest.mark.parametrize("listed", [False, True])
def test_accumulating_phase_is_the_base_bit_for_bit(space: str, base: str, listed: bool) -> None:
    plain, model = small(listed=listed), small(listed=listed)
    config = OMoEConfig(space=space, first_orthogonal_step=100)  # type: ignore[arg-type]
    train(plain, BASES[base](plain.parameters()), batches(4))
    train(model, wrapped(model, config, base), batches(4))
    assert_bitwise(weights(model), weights(plain))


@pytest.mark.parametrize("combine", ["mean", "load", "product", "union"])
def test_identity_projectors_are_the_base_bit_for_bit(combine: str) -> None:
    plain, model = small(), small()
    optimizer = wrapped(model, OMoEConfig(space="input", combine=combine))  # type: ignore[arg-type]
    train(plain, BASES["adamw"](plain.parameters()), batches(1))
    train(model, optimizer, batches(1))  # the projectors are refreshed after they were used
    assert_bitwise(weights(model), weights(plain))
    assert all(energy_E.eq(0).all() for energy_E in optimizer.removed_energy().values())


def test_first_step_of_the_update_space_is_the_base_bit_for_bit() -> None:
    plain, model = small(), small()
    train(plain, BASES["adamw"](plain.parameters()), batches(1))
    train(model, wrapped(model, OMoEConfig()), batches(1))
    assert_bitwise(weights(model), weights(plain))


@pytest.mark.parametrize("space", ["update", "input"])
def test_only_the_named_linears_are_projected(space: str) -> None:
    plain, model = small(), small()
    optimizers = BASES["adamw"](plain.parameters()), wrapped(model, OMoEConfig(space=space, linears="up"))  # type: ignore[arg-type]
    for batch in batches(3):
        for parameter, other in zip(plain.parameters(), model.parameters(), strict=True):
            parameter.grad = torch.randn_like(parameter)
            other.grad = parameter.grad.clone()
        with torch.no_grad():
            model(*batch[:2])
        for optimizer in optimizers:
            optimizer.step()
    after, before = weights(model), weights(plain)
    differ = {name for name in after if not torch.equal(after[name], before[name])}
    assert differ == {"experts.up.weight"}


def assert_bitwise(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name in actual:
        assert torch.equal(actual[name], expected[name]), name


# Properties


@pytest.mark.parametrize("base", BASES)
def test_update_space_steps_are_orthogonal_to_the_others_changes(base: str) -> None:
    model = small(dtype=torch.float64)
    optimizer = wrapped(model, OMoEConfig(), base)
    data = [cast(batch, torch.float64) for batch in batches(4)]
    start = model.experts.up.weight.detach().clone()
    train(model, optimizer, data[:3])
    before = model.experts.up.weight.detach().clone()
    train(model, optimizer, data[3:])
    decay = LR * DECAY if base == "adamw" else 0.0
    step_EK = (model.experts.up.weight.detach() - before * (1 - decay)).flatten(1)
    change_EK = (before - start).flatten(1)
    overlap_EJ = step_EK @ change_EK.T / step_EK.norm(dim=1)[:, None] / change_EK.norm(dim=1)
    others = overlap_EJ[~torch.eye(NUM_EXPERTS, dtype=torch.bool)]
    assert others.abs().max() < 1e5 * torch.finfo(torch.float64).eps
    assert overlap_EJ.diagonal().abs().min() > 0.01


def test_removed_energy_is_what_was_removed() -> None:
    model, plain = small(dtype=torch.float64), small(dtype=torch.float64)
    optimizer, base = wrapped(model, OMoEConfig(), "sgd"), BASES["sgd"](plain.parameters())
    data = [cast(batch, torch.float64) for batch in batches(3)]
    train(model, optimizer, data[:2])
    plain.load_state_dict(model.state_dict())
    base.load_state_dict(copy.deepcopy(optimizer.base.state_dict()))
    before_EK = model.experts.up.weight.detach().flatten(1).clone()
    train(model, optimizer, data[2:])
    train(plain, base, data[2:])
    after_EK, whole_EK = (m.experts.up.weight.detach().flatten(1) for m in (model, plain))
    expected = (whole_EK - after_EK).square().sum(1) / (whole_EK - before_EK).square().sum(1)
    actual = optimizer.removed_energy()["experts.up"]
    assert actual.dtype == torch.float32
    assert_equal_up_to_rounding("energy", actual, expected.float(), roundings=64)
    assert (actual > 0).all()
    assert (actual < 1).all()


def test_removed_energy_keeps_to_the_latest_orthogonal_step() -> None:
    model = small()
    optimizer = wrapped(model, OMoEConfig(period=2))
    assert optimizer.removed_energy() == {}
    train(model, optimizer, batches(1))
    assert optimizer.removed_energy()["experts.up"].eq(0).all()
    train(model, optimizer, batches(1))
    energy_E = optimizer.removed_energy()["experts.up"]
    assert energy_E.gt(0).all()
    train(model, optimizer, batches(1))
    assert torch.equal(optimizer.removed_energy()["experts.up"], energy_E)


LEFT = {
    "update": OMoEConfig(),
    "length": OMoEConfig(control="length"),
    "update-gradient": OMoEConfig(projects="gradient"),
    "mean": OMoEConfig(space="input", alpha=1.0),
    "union": OMoEConfig(space="input", alpha=1.0, combine="union"),
    "output": OMoEConfig(space="input", alpha=1.0, side="output"),
    "own": OMoEConfig(space="input", alpha=1.0, control="own"),
}


@pytest.mark.parametrize("config", LEFT.values(), ids=LEFT.keys())
@pytest.mark.parametrize("listed", [False, True])
def test_leftover_is_what_the_weights_say(config: OMoEConfig, listed: bool) -> None:
    """From the weights around the measured step, in float64, by another way than the optimizer's."""
    model = small(listed=listed, dtype=torch.float64)
    linears = find_expert_linears(model)
    base = BASES["adamw"](model.parameters())
    optimizer = OMoE(base, linears, config, measure_every=3)
    observer = MeanInputs(linears, side=config.side)
    start = {linear.name: torch.stack(expert_weights(linear)) for linear in linears}
    means: dict[str, list[Tensor]] = {linear.name: [] for linear in linears}
    for batch in batches(3):
        before = {linear.name: torch.stack(expert_weights(linear)) for linear in linears}
        seen = {name: list(found) for name, found in means.items()}
        assert all(not share_E.any() for share_E in optimizer.leftover().values())
        train(model, optimizer, [cast(batch, torch.float64)])
        for name, taken in observer.take().items():
            means[name].append(taken.mean_EI.double())
    for linear in linears:
        step_EOI = torch.stack(expert_weights(linear)) - before[linear.name] * (1 - LR * DECAY)
        change_EOI = before[linear.name] - start[linear.name]
        expected = []
        for expert, step_OI in enumerate(step_EOI):
            others = [other for other in range(NUM_EXPERTS) if other != expert]
            if config.space == "update":
                left = step_OI - outside_span(step_OI, [change_EOI[other] for other in others])
            else:
                projector = torch.eye(seen[linear.name][0].shape[1], dtype=torch.float64)
                for mean_EI in seen[linear.name]:
                    for other in others:
                        projector = owm(projector, mean_EI[other], config.alpha)
                kept_OI = step_OI if config.side == "input" else step_OI.T
                left = kept_OI - kept_OI @ projector
            expected.append(left.norm() / step_OI.norm())
        actual_E = optimizer.leftover()[linear.name]
        assert actual_E.dtype == torch.float32
        roundings = 64 if config.space == "update" else 2**10  # projectors are float32
        expected_E = torch.stack(expected).float()
        scale_E = expected_E if expected_E.max() > 1e-6 else torch.ones_like(expected_E)
        assert_equal_up_to_rounding("leftover", actual_E - expected_E + scale_E, scale_E, roundings=roundings)
        exact = config in (LEFT["update"],)
        assert (actual_E < 1e-9).all() if exact else (actual_E > 1e-3).all()


def test_leftover_is_measured_in_the_last_orthogonal_step_of_so_many() -> None:
    model = small()
    config = OMoEConfig(space="input", alpha=1.0, period=2)
    optimizer = OMoE(BASES["sgd"](model.parameters()), find_expert_linears(model), config, measure_every=5)
    shares = []
    for batch in batches(10):
        train(model, optimizer, [batch])
        shares.append(optimizer.leftover()["experts.up"].tolist())
    changed = [step for step in range(1, 10) if shares[step] != shares[step - 1]]
    assert changed == [3, 9]
    plain = small()
    train(plain, wrapped(plain, config, "sgd"), batches(10))
    assert_bitwise(weights(plain), weights(model))
    assert wrapped(plain, config).leftover() == {}


@pytest.mark.parametrize("wrong", [-1, True, 1.0])
def test_bad_numbers_of_steps_to_measure_are_refused(wrong: Any) -> None:
    model = small()
    with pytest.raises(ValueError, match=f"measure_every={wrong}"):
        OMoE(BASES["sgd"](model.parameters()), find_expert_linears(model), OMoEConfig(), measure_every=wrong)


def test_trace_share_falls_from_one() -> None:
    model = small()
    optimizer = wrapped(model, OMoEConfig(space="input", alpha=1.0))
    assert optimizer.trace_share() == {}
    train(model, optimizer, batches(1))
    first = optimizer.trace_share()["experts.up"]
    train(model, optimizer, batches(3)[1:])
    second = optimizer.trace_share()["experts.up"]
    assert (first < 1).all()
    assert (second < first).all()
    with pytest.raises(ValueError, match="space='update'"):
        wrapped(small(), OMoEConfig()).trace_share()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_repeats_bit_for_bit(config: OMoEConfig) -> None:
    one, other = small(), small()
    train(one, wrapped(one, config), batches(4))
    train(other, wrapped(other, config), batches(4))
    assert_bitwise(weights(one), weights(other))


# Odd steps


@pytest.mark.parametrize("space", ["update", "input"])
@pytest.mark.parametrize("listed", [False, True])
def test_parameters_without_gradient_stay(space: str, listed: bool) -> None:
    model = small(listed=listed)
    optimizer = wrapped(model, OMoEConfig(space=space))  # type: ignore[arg-type]
    train(model, optimizer, batches(3))
    before = weights(model)
    linear = optimizer.expert_linears[0]
    optimizer.zero_grad()
    loss_of(model, batches(4)[3]).backward()
    linear.parameters[-1].grad = None
    optimizer.step()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    after = weights(model)
    kept = names[id(linear.parameters[-1])]
    assert [name for name in after if torch.equal(after[name], before[name])] == [kept]
    assert optimizer.removed_energy()["experts.up"][-1] == 0


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("listed", [False, True])
def test_experts_without_tokens_and_zero_gradients(config: OMoEConfig, listed: bool) -> None:
    model = small(listed=listed)
    optimizer = wrapped(model, config)
    for x_TM, expert_T, target in batches(3):
        train(model, optimizer, [(x_TM, expert_T.clamp(max=1), target)])
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    for name, tensor in weights(model).items():
        assert tensor.isfinite().all(), name
    if config.space == "input" and config.rank is None:
        for state in optimizer.linear_state.values():
            size = state["projector_EII"].shape[-1]
            assert state["num_tokens_E"][2:].sum() == 0
            assert torch.equal(state["projector_EII"][3], torch.eye(size)) is (
                config.combine != "union" and config.source != "weights"
            )


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_gradient_that_is_not_a_number_stays_with_its_expert(config: OMoEConfig) -> None:
    model = small()
    optimizer = wrapped(model, config, "sgd")
    train(model, optimizer, batches(2))
    for batch in batches(2):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        model.experts.up.weight.grad[0] = torch.nan
        optimizer.step()
        model.experts.up.weight.data[0] = 0.1  # what a loss scaler or a person would do about it
    for name, tensor in weights(model).items():
        assert tensor.isfinite().all(), name


@pytest.mark.parametrize("space", ["update", "input"])
def test_bfloat16_parameters(space: str) -> None:
    model = small(dtype=torch.bfloat16)
    optimizer = wrapped(model, OMoEConfig(space=space))  # type: ignore[arg-type]
    train(model, optimizer, [cast(batch, torch.bfloat16) for batch in batches(4)])
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert all(tensor.isfinite().all() for tensor in weights(model).values())
    assert optimizer.removed_energy()["experts.up"].gt(0).all()
    if space == "input":
        assert optimizer.linear_state["experts.up"]["projector_EII"].dtype == torch.float32


def test_gradient_accumulation_counts_every_forward() -> None:
    halves, whole = small(), small()
    config = OMoEConfig(space="input", alpha=1.0)
    optimizers = wrapped(halves, config), wrapped(whole, config)
    for batch in batches(2):
        train(whole, optimizers[1], [batch])
        optimizers[0].zero_grad()
        for part in range(2):
            (loss_of(halves, tuple(tensor[part::2] for tensor in batch)) / 2).backward()  # type: ignore[arg-type]
        halves.eval()
        halves(*batch[:2])
        halves.train()
        optimizers[0].step()
    left, right = (optimizer.linear_state["experts.up"] for optimizer in optimizers)
    assert torch.equal(left["num_tokens_E"], right["num_tokens_E"])
    assert_equal_up_to_rounding("projector", left["projector_EII"], right["projector_EII"], roundings=64)


def test_projectors_are_made_symmetric_every_thousand_steps() -> None:
    model = small()
    optimizer = wrapped(model, OMoEConfig(space="input", alpha=1.0))
    train(model, optimizer, batches(1))
    optimizer.linear_state["experts.up"]["projector_EII"][0, 0, 1] += 1e-3
    optimizer.num_steps = 998
    train(model, optimizer, batches(1))
    projector_EII = optimizer.linear_state["experts.up"]["projector_EII"]
    assert (projector_EII - projector_EII.mT).abs().max() > 1e-4
    train(model, optimizer, batches(1))
    projector_EII = optimizer.linear_state["experts.up"]["projector_EII"]
    assert torch.equal(projector_EII, projector_EII.mT)


@pytest.mark.parametrize("config", [CONFIGS["update"], CONFIGS["mean"]], ids=["update", "input"])
def test_closures_reach_the_base(config: OMoEConfig) -> None:
    plain, model = small(), small()
    losses = []
    for network, optimizer in (
        (plain, torch.optim.LBFGS(plain.parameters(), max_iter=3)),
        (model, OMoE(torch.optim.LBFGS(model.parameters(), max_iter=3), find_expert_linears(model), config)),
    ):

        def closure(network: SmallMoE = network, optimizer: Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(network, batches(1)[0])
            loss.backward()
            return loss

        losses.append(optimizer.step(closure))  # type: ignore[arg-type]
    assert torch.equal(losses[0], losses[1])  # type: ignore[arg-type]
    assert_bitwise(weights(model), weights(plain))  # the first step has nothing to remove


def test_gradients_that_are_needed_first_are_no_closures() -> None:
    model = small()
    with pytest.raises(ValueError, match="closure: got one with source='gradients'"):
        wrapped(model, CONFIGS["gradients"]).step(lambda: 0.0)


@pytest.mark.parametrize("source", ["weights", "gradients"])
@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_a_gradient_that_says_nothing_refreshes_nothing(source: str, listed: bool, value: float) -> None:
    model = small(listed=listed)
    optimizer = wrapped(model, OMoEConfig(space="input", alpha=0.01, source=source), "sgd")  # type: ignore[arg-type]
    loss_of(model, batches(1)[0]).backward()
    first = optimizer.expert_linears[0].parameters[0]
    gradient_OI = first.grad if listed else first.grad[0]  # type: ignore[index]
    gradient_OI.fill_(value) if value == 0 else gradient_OI[1].fill_(value)  # type: ignore[union-attr]
    optimizer.step()
    projector_EII = optimizer.linear_state["experts.up"]["projector_EII"]
    identity_II = torch.eye(projector_EII.shape[1])
    unchanged = [torch.equal(projector_II, identity_II) for projector_II in projector_EII]
    assert unchanged == [source == "gradients" or value != 0, False, False, False]


# Being an optimizer


def test_schedulers_and_groups_are_shared_with_the_base() -> None:
    model = small()
    optimizer = wrapped(model, OMoEConfig())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    for batch in batches(2):
        train(model, optimizer, [batch])
        scheduler.step()
    assert optimizer.base.param_groups[0]["lr"] == LR * (1 / 3)
    assert optimizer.state is optimizer.base.state
    assert optimizer.defaults == optimizer.base.defaults
    extra = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [extra], "lr": 1.0})
    assert optimizer.base.param_groups[1]["params"] == [extra]
    extra.grad = torch.ones(2)
    train_state = copy.deepcopy(optimizer.state_dict())
    optimizer.step()
    assert not torch.equal(extra, torch.ones(2))
    optimizer.load_state_dict(train_state)
    assert optimizer.param_groups is optimizer.base.param_groups
    assert optimizer.state is optimizer.base.state


def test_the_scheduled_rate_is_the_rate_of_decay() -> None:
    model = small()
    optimizer = wrapped(model, OMoEConfig())
    train(model, optimizer, batches(3))
    for group in optimizer.param_groups:
        group["lr"] = LR / 4
    before = weights(model)
    optimizer.zero_grad(set_to_none=False)
    for state in optimizer.state.values():
        state["exp_avg"].zero_()
    optimizer.step()
    for name, tensor in weights(model).items():
        assert_equal_up_to_rounding(name, tensor, before[name] * (1 - LR / 4 * DECAY), roundings=2)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("listed", [False, True])
def test_resumes_bit_for_bit_through_a_file(config: OMoEConfig, listed: bool) -> None:
    data = batches(7)
    model = small(listed=listed)
    optimizer = wrapped(model, config)
    train(model, optimizer, data[:4])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, data[4:])
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = SmallMoE(listed=listed)
    resumed.load_state_dict(saved["model"])
    resumed_optimizer = wrapped(resumed, config)
    resumed_optimizer.load_state_dict(saved["optimizer"])
    train(resumed, resumed_optimizer, data[4:])
    assert_bitwise(weights(resumed), weights(model))
    for name, energy_E in optimizer.removed_energy().items():
        assert torch.equal(resumed_optimizer.removed_energy()[name], energy_E)


def test_loading_the_bases_state_alone_is_refused() -> None:
    model = small()
    optimizer = wrapped(model, OMoEConfig())
    with pytest.raises(ValueError, match="state_dict\\['omoe'\\]"):
        optimizer.load_state_dict(optimizer.base.state_dict())
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.num_steps == 0


def test_a_transformers_trainer_resumes_bit_for_bit(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.moe = small()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            batch = x, torch.arange(len(x)) % NUM_EXPERTS, labels
            return {"loss": loss_of(self.moe, batch)}

    x_TM, _, target = batches(1, tokens=64)[0]
    data = [{"x": x, "labels": label} for x, label in zip(x_TM, target, strict=True)]

    def run(*, resume: bool) -> dict[str, Tensor]:
        model = WithLoss()
        arguments = TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=8, max_steps=4, save_steps=2, use_cpu=True,
            report_to=[], disable_tqdm=True, logging_steps=100, dataloader_num_workers=0,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=data, optimizers=(wrapped(model, OMoEConfig()), None))  # type: ignore[arg-type]
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resume else None)
        return weights(model)

    whole = run(resume=False)
    assert_bitwise(run(resume=True), whole)
    assert not torch.equal(whole["moe.experts.up.weight"], WithLoss().moe.experts.up.weight)


# Several ranks


def uneven(batch: Batch) -> Batch:
    """Experts 2 and 3 get tokens on rank 0 alone."""
    x_TM, expert_T, target = batch
    return x_TM, torch.where(torch.arange(len(x_TM)) % 2 == 1, expert_T.clamp(max=1), expert_T), target


def train_on_rank(rank: int, world_size: int, folder: str) -> None:
    model = small()
    base = BASES["sgd"](model.parameters())
    config = OMoEConfig(space="input", alpha=1.0)
    with pytest.raises(ValueError, match="process_group=None with 2 ranks"):
        OMoE(base, find_expert_linears(model), config)
    for no_group in (OMoEConfig(), OMoEConfig(space="input", source="weights")):  # neither needs one
        wrapped(model, no_group)
    optimizer = OMoE(base, find_expert_linears(model), config, process_group=dist.group.WORLD)
    for batch in batches(3):
        optimizer.zero_grad()
        x_TM, expert_T, target = (tensor[rank::world_size] for tensor in uneven(batch))
        loss_of(model, (x_TM, expert_T, target)).backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= world_size
        optimizer.step()
    torch.save({"weights": weights(model), "linears": optimizer.linear_state}, f"{folder}/{rank}.pt")


def test_ranks_agree_bit_for_bit_and_with_one_process(tmp_path: Path) -> None:
    run_ranks(2, train_on_rank, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert_bitwise(ranks[0]["weights"], ranks[1]["weights"])
    single: dict[torch.dtype, dict[str, Tensor]] = {}
    for dtype in (torch.float32, torch.float64):
        model = small(dtype=dtype)
        optimizer = wrapped(model, OMoEConfig(space="input", alpha=1.0), "sgd")
        train(model, optimizer, [cast(uneven(batch), dtype) for batch in batches(3)])
        single[dtype] = {name: state["projector_EII"] for name, state in optimizer.linear_state.items()}
    for name, state in ranks[0]["linears"].items():
        assert_bitwise(state, ranks[1]["linears"][name])
        projectors = (single[dtype][name] for dtype in (torch.float32, torch.float64))
        assert_close(name, state["projector_EII"], *projectors)


# Errors


def test_base_must_be_an_optimizer() -> None:
    with pytest.raises(TypeError, match="base: got list"):
        OMoE([], find_expert_linears(small()), OMoEConfig())  # type: ignore[arg-type]


def test_base_must_hold_the_experts() -> None:
    model = small()
    with pytest.raises(ValueError, match=r"base: AdamW does not hold the parameters of expert linear 'experts.up'"):
        OMoE(BASES["adamw"](model.head.parameters()), find_expert_linears(model), OMoEConfig())


def test_one_expert_alone_is_refused() -> None:
    model = SmallMoE(num_experts=1)
    with pytest.raises(ValueError, match=r"'experts\.up' has one expert"):
        wrapped(model, OMoEConfig())


def test_names_must_be_unique_and_present() -> None:
    model = small()
    linears = find_expert_linears(model)
    with pytest.raises(ValueError, match="expert_linears: got the names"):
        OMoE(BASES["adamw"](model.parameters()), linears + linears, OMoEConfig())
    with pytest.raises(ValueError, match="expert_linears: got the names"):
        OMoE(BASES["adamw"](model.parameters()), (), OMoEConfig())


def test_modules_are_needed_for_inputs_only() -> None:
    model = small()
    linear = ExpertLinear(name="by hand", parameters=(model.experts.up.weight,), modules=())
    base = BASES["adamw"](model.parameters())
    with pytest.raises(ValueError, match="'by hand' has 0 modules"):
        OMoE(base, [linear], OMoEConfig(space="input"))
    for config in (OMoEConfig(), CONFIGS["weights"], CONFIGS["gradients"]):
        train(model, OMoE(base, [linear], config), batches(2))
    assert not model.experts.up._forward_pre_hooks
    assert not model.experts.up._forward_hooks


def test_unknown_decay_is_refused_at_once() -> None:
    class Other(torch.optim.Optimizer):
        pass

    model = small()
    base = Other(model.parameters(), {"lr": 1.0, "weight_decay": 0.1})
    with pytest.raises(ValueError, match="base: Other has weight_decay"):
        OMoE(base, find_expert_linears(model), OMoEConfig())


def test_gradients_without_an_observed_forward_are_refused() -> None:
    model = small()
    optimizer = wrapped(model, OMoEConfig(space="input"))
    model.eval()
    loss_of(model, batches(1)[0]).backward()
    with pytest.raises(RuntimeError, match=r"space='input': 'experts\.up' has gradients"):
        optimizer.step()
