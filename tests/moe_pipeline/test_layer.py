import copy
from collections.abc import Callable
from itertools import product

import pytest
import torch
from closeness import assert_all_close
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from moe_pipeline import (
    FeedForwardExperts,
    Gate,
    GateConfig,
    ModuleExperts,
    MoEFeedForward,
    MoELayer,
    PipelineConfig,
    routed,
)
from moe_pipeline.dispatch import local_part
from moe_pipeline.reference import kept_entries, moe_layer, router_losses
from moe_pipeline.run.ranks import ExpertRanks, expert_ranks

CONFIGS = {
    "top-1": GateConfig(num_experts=4, top_k=1, normalize=False, z_weight=0.1),
    "top-2": GateConfig(num_experts=4, importance_weight=0.3),
    "top-3 with capacity": GateConfig(num_experts=4, top_k=3, capacity_factor=0.6),
    "switch": GateConfig(num_experts=4, top_k=1, kind="switch", capacity_factor=1.0),
    "gshard": GateConfig(num_experts=4, kind="gshard", capacity_factor=0.8),
    "expert choice": GateConfig(num_experts=4, kind="expert_choice", capacity_factor=0.9),
    "one expert": GateConfig(num_experts=1, top_k=1),
}


def _layer(config: GateConfig) -> MoELayer:
    layer = MoELayer(Gate(config, 6), FeedForwardExperts(config.num_experts, 6, 10, activation="gelu"))
    layer.gate.router.weight.data *= 30  # a trained router has opinions
    return layer.eval()


def _expert(layer: MoELayer, e: int) -> Callable[[Tensor], Tensor]:
    up, down = layer.experts.up, layer.experts.down

    def feed_forward(x_M: Tensor) -> Tensor:
        hidden_H = functional.gelu(functional.linear(x_M, up.weight[e], up.bias[e]))
        return functional.linear(hidden_H, down.weight[e], down.bias[e])

    return feed_forward


def _reference(layer: MoELayer, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    config = layer.gate.config
    x_TM = x[mask]
    wide = torch.promote_types(x.dtype, torch.float32)
    logits_TE = functional.linear(x_TM.to(wide), layer.gate.router.weight.to(wide))
    experts = [_expert(layer, e) for e in range(config.num_experts)]
    y = torch.zeros_like(x).index_put((mask,), moe_layer(x_TM, logits_TE, config, experts).to(x.dtype))
    losses = router_losses(logits_TE, config)
    loss = sum(getattr(config, f"{name}_weight") * value for name, value in losses.items())
    owners = [entry.expert for entry in kept_entries(logits_TE, config)]
    return y, loss, [owners.count(e) for e in range(config.num_experts)]


PIPELINES = {
    "as it comes": PipelineConfig(),
    "chunks": PipelineConfig(num_chunks=3),
    "offload": PipelineConfig(num_chunks=2, restore="S1"),
    "recompute": PipelineConfig(num_chunks=5, restore="S4", overlap=False),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_losses_and_gradients_equal_the_reference(
    name: str, pipeline: str, dtype: torch.dtype, masked: bool
) -> None:
    layer = _layer(CONFIGS[name]).to(dtype)
    layer.pipeline = PIPELINES[pipeline]
    x, grad = torch.randn(3, 7, 6).to(dtype), torch.randn(3, 7, 6).to(dtype)
    mask = torch.rand(3, 7) < 0.6 if masked else torch.ones(3, 7, dtype=torch.bool)

    def run(to: torch.dtype, *, fast: bool) -> tuple[dict[str, Tensor], list[int]]:
        layer.to(to).zero_grad()
        leaf = x.to(to, copy=True).requires_grad_()
        if fast:
            y, record = layer(leaf, mask if masked else None)
            loss, load = record.loss, record.load_E.tolist()
        else:
            y, loss, load = _reference(layer, leaf, mask)
        ((y * grad.to(to)).sum() + 10 * loss).backward()
        gradients = {name: parameter.grad + 1 for name, parameter in layer.named_parameters()}  # may cancel to nothing
        return {"y": y.detach(), "loss": loss.detach(), "x": leaf.grad, **gradients}, load

    (actual, load), (reference, _), (truth, true_load) = (
        run(dtype, fast=True),
        run(dtype, fast=False),
        run(torch.double, fast=False),
    )
    assert load == true_load
    assert_all_close(actual, reference, truth)


@settings(deadline=None, max_examples=40)
@given(st.permutations(range(12)))
def test_without_capacity_the_order_of_tokens_does_not_matter(order: list[int]) -> None:
    torch.manual_seed(0)
    layer, x_TM = _layer(GateConfig(num_experts=4)).double(), torch.randn(12, 6).double()
    y_TM, _ = layer(x_TM)
    shuffled_TM, _ = layer(x_TM[order])
    assert_all_close({"y": shuffled_TM}, {"y": y_TM[order]}, {"y": y_TM[order]})


def test_masked_tokens_are_zero_and_cost_nothing() -> None:
    layer, x = _layer(CONFIGS["top-2"]), torch.randn(2, 5, 6)
    mask = torch.tensor([[True, True, True, False, False], [True, False, False, False, False]])
    y, record = layer(x, mask)
    assert (y[~mask] == 0).all()
    assert (y[mask] != 0).all()
    assert record.load_E.sum() == 2 * 4
    assert record.dropped == 0


@pytest.mark.parametrize("shape", [(0, 6), (3, 0, 6)])
def test_no_tokens(shape: tuple[int, ...]) -> None:
    for config in CONFIGS.values():
        layer = _layer(config).train()
        y, record = layer(torch.randn(shape))
        (y.sum() + record.loss).backward()
        assert y.shape == shape
        assert record.load_E.tolist() == [0] * config.num_experts
        assert record.dropped == 0
        assert all(parameter.grad is not None for parameter in layer.parameters())


def test_a_single_vector_is_one_token() -> None:
    y, record = _layer(CONFIGS["top-2"])(torch.randn(6))
    assert y.shape == (6,)
    assert record.load_E.sum() == 2


def test_dropped_is_the_share_that_capacity_turned_away() -> None:
    layer = _layer(GateConfig(num_experts=4, top_k=1, kind="switch", capacity_factor=1.0))
    _, record = layer(torch.randn(6).expand(8, 6))
    assert record.dropped == 0.75  # all eight want one expert, which takes two
    assert sorted(record.load_E.tolist()) == [0, 0, 0, 2]


def test_repeats_bitwise_and_keeps_records_off_the_module() -> None:
    layer, x = _layer(CONFIGS["top-2"]), torch.randn(50, 6)
    before = set(vars(layer)) | set(vars(layer.gate))
    first, second = layer(x)[0], layer(x)[0]
    assert torch.equal(first, second)
    assert set(vars(layer)) | set(vars(layer.gate)) == before


def test_autocast_returns_its_dtype_and_trains_every_parameter() -> None:
    layer = _layer(CONFIGS["top-2"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, record = layer(torch.randn(50, 6))
    assert y.dtype == torch.bfloat16
    assert record.loss.dtype == torch.float32
    (y.float().square().sum() + record.loss).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in layer.parameters())


def test_any_modules_as_experts() -> None:
    config = GateConfig(num_experts=2)
    layer = MoELayer(Gate(config, 6), ModuleExperts([nn.Identity(), nn.Identity()]))
    x = torch.randn(9, 6)
    assert_all_close({"y": layer(x)[0]}, {"y": x}, {"y": x})


class _Model(nn.Module):
    """Two stacks that use their layers twice, as an encoder does in a paired objective."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList([MoEFeedForward(_layer(CONFIGS["top-2"])) for _ in range(2)])
        self.decoder = MoEFeedForward(_layer(CONFIGS["top-2"]))

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.encoder, *self.encoder):
            x = layer(x)
        return self.decoder(x)


def _num_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_routed_collects_every_call_and_leaves_nothing_behind() -> None:
    model, x = _Model(), torch.randn(2, 5, 6)
    plain = model(x)
    with routed(model) as records:
        y = model(x)
    assert torch.equal(y, plain)
    assert {name: len(calls) for name, calls in records.items()} == {
        "encoder.0.moe": 2,
        "encoder.1.moe": 2,
        "decoder.moe": 1,
    }
    sum(record.loss for calls in records.values() for record in calls).backward()
    assert model.decoder.moe.gate.router.weight.grad.abs().sum() > 0
    assert _num_hooks(model) == 0
    model(x)
    assert len(records["decoder.moe"]) == 1
    with pytest.raises(RuntimeError, match="inside"), routed(model, {"": torch.ones(2, 5, dtype=torch.bool)}):
        raise RuntimeError("inside")
    assert _num_hooks(model) == 0


def test_routed_gives_each_layer_the_mask_of_its_longest_prefix() -> None:
    model, x = _Model(), torch.randn(2, 5, 6)
    masks = {"": torch.zeros(2, 5, dtype=torch.bool), "encoder": torch.ones(2, 5, dtype=torch.bool)}
    masks["encoder"][0, 0] = False
    masks["encoder.1"] = masks["encoder"].clone()
    masks["encoder.1"][1] = False
    with routed(model, masks) as records:
        model(x)
    rows = {name: calls[0].load_E.sum().item() for name, calls in records.items()}
    assert rows == {"encoder.0.moe": 2 * 9, "encoder.1.moe": 2 * 4, "decoder.moe": 0}
    with routed(model, {"decoder": masks["encoder"]}) as records:
        model(x)
    rows = {name: calls[0].load_E.sum().item() for name, calls in records.items()}
    assert rows == {"encoder.0.moe": 20, "encoder.1.moe": 20, "decoder.moe": 18}


def test_routed_refuses() -> None:
    model, good = _Model(), torch.ones(2, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match="model: Linear contains no MoELayer"), routed(nn.Linear(2, 2)):
        pass
    with pytest.raises(ValueError, match=r"masks: 'enc' matches no MoE layer.*encoder.0"), routed(model, {"enc": good}):
        pass
    wrong_shape = r"mask of layer 'encoder.1.moe': got shape \(2, 5\)"
    with routed(model, {"encoder.1": good}), pytest.raises(ValueError, match=wrong_shape):
        model(torch.randn(2, 4, 6))
    wrong_dtype = r"mask of layer 'encoder.0.moe': got dtype torch.int64"
    with routed(model, {"": good.long()}), pytest.raises(TypeError, match=wrong_dtype):
        model(torch.randn(2, 5, 6))


def test_layer_refuses() -> None:
    gate = Gate(GateConfig(num_experts=4), 6)
    with pytest.raises(ValueError, match=r"experts: got num_experts=3.*4"):
        MoELayer(gate, FeedForwardExperts(3, 6, 10))
    with pytest.raises(ValueError, match="experts: got num_experts=None"):
        MoELayer(gate, nn.Linear(6, 6))
    by_ranks = PipelineConfig(num_chunks=2, split="ranks")
    with pytest.raises(ValueError, match=r"pipeline.num_chunks: got 2 with split='ranks'.*the number of ranks, 1"):
        MoELayer(gate, FeedForwardExperts(4, 6, 10), pipeline=by_ranks)
    layer = MoELayer(gate, FeedForwardExperts(4, 6, 10))
    with pytest.raises(ValueError, match=r"mask: got shape \(3,\)"):
        layer(torch.randn(2, 6), torch.ones(3, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"mask: got dtype torch.float32"):
        layer(torch.randn(2, 6), torch.ones(2))


RESTORES = ("none", "S1", "S2", "S3", "S4")


def _spread(restore: str, *, listed: bool, ranks: ExpertRanks | None) -> MoELayer:
    torch.manual_seed(3)
    gate = Gate(GateConfig(num_experts=4), 6)
    gate.router.weight.data *= 30
    experts: nn.Module = FeedForwardExperts(4, 6, 10, activation="gelu", dropout=0.5 if listed else 0.0)
    if listed:
        experts = ModuleExperts([nn.Sequential(nn.Linear(6, 7), nn.Dropout(0.5), nn.Linear(7, 6)) for _ in range(4)])
    if ranks is not None:
        local_part(experts, ranks)
    config = PipelineConfig(num_chunks=3, restore=restore)  # type: ignore[arg-type]
    return MoELayer(gate, experts, pipeline=config, ranks=ranks)


def _trained(layer: MoELayer, rank: int, call: Callable[[MoELayer, Tensor], Tensor]) -> dict[str, Tensor]:
    """Results and gradients of two layers in a row, which are one, with a map between them."""
    generator = torch.Generator().manual_seed(4 + rank)
    x_TM = torch.randn(9 - 2 * rank, 6, generator=generator).requires_grad_()
    layer.zero_grad()
    torch.manual_seed(5)
    y_TM = call(layer, torch.tanh(call(layer, x_TM)))
    y_TM.square().sum().backward()
    grads = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    return {"y": y_TM.detach(), "x": x_TM.grad, **grads}


def _plainly(layer: MoELayer, x_TM: Tensor) -> Tensor:
    return layer(x_TM)[0]


def _checkpointed(layer: MoELayer, x_TM: Tensor) -> Tensor:
    y_TM, _ = checkpoint(layer, x_TM, use_reentrant=False)
    return y_TM


def _check_checkpoint(rank: int, num_ranks: int) -> None:
    ranks = expert_ranks() if num_ranks > 1 else None
    for restore, listed in product(RESTORES, (False, True)):
        layer = _spread(restore, listed=listed, ranks=ranks)
        plain = _trained(layer, rank, _plainly)
        assert_all_close(_trained(layer, rank, _checkpointed), plain, plain)


def _check_copy(rank: int, num_ranks: int) -> None:
    ranks = expert_ranks() if num_ranks > 1 else None
    for listed in (False, True):
        layer = _spread("S1", listed=listed, ranks=ranks)
        first = _trained(layer, rank, _plainly)
        twin = copy.deepcopy(layer)
        assert twin.ranks is ranks
        assert_all_close(_trained(twin, rank, _plainly), first, first)


def _check_unfrozen(rank: int, num_ranks: int) -> None:
    """Experts that are frozen when the layer is built and learn later, as in training stage by stage."""
    ranks = expert_ranks() if num_ranks > 1 else None
    first = _trained(_spread("S4", listed=False, ranks=ranks), rank, _plainly)
    torch.manual_seed(3)
    gate = Gate(GateConfig(num_experts=4), 6)
    gate.router.weight.data *= 30
    experts = FeedForwardExperts(4, 6, 10, activation="gelu")
    if ranks is not None:
        local_part(experts, ranks)
    layer = MoELayer(
        gate, experts.requires_grad_(False), pipeline=PipelineConfig(num_chunks=3, restore="S4"), ranks=ranks
    )
    experts.requires_grad_(True)
    assert_all_close(_trained(layer, rank, _plainly), first, first)


@pytest.mark.parametrize("check", [_check_checkpoint, _check_copy, _check_unfrozen])
def test_checkpointed_copied_and_unfrozen_layers_train_alike(check: Callable[[int, int], None]) -> None:
    check(0, 1)


def _check_sizes(rank: int, num_ranks: int) -> None:
    ranks, gate = expert_ranks(), Gate(GateConfig(num_experts=4), 6)
    with pytest.raises(ValueError, match=r"experts: got num_experts=4.*shared by 2 ranks, 2 on each.*local_part"):
        MoELayer(gate, FeedForwardExperts(4, 6, 10), ranks=ranks)
    with pytest.raises(ValueError, match="num_experts: got 3 for 2 ranks"):
        MoELayer(Gate(GateConfig(num_experts=3), 6), FeedForwardExperts(3, 6, 10), ranks=ranks)
    by_ranks = PipelineConfig(num_chunks=3, split="ranks")
    with pytest.raises(ValueError, match=r"pipeline.num_chunks: got 3 with split='ranks'.*the number of ranks, 2"):
        MoELayer(gate, FeedForwardExperts(2, 6, 10), pipeline=by_ranks, ranks=ranks)


def _check_on_ranks(rank: int, num_ranks: int) -> None:
    for check in (_check_sizes, _check_checkpoint, _check_copy, _check_unfrozen):
        check(rank, num_ranks)


def test_layers_on_ranks_refuse_what_does_not_fit_and_train_checkpointed_copied_and_unfrozen() -> None:
    run_ranks(2, _check_on_ranks)


@pytest.mark.parametrize("restore", RESTORES)
def test_a_second_derivative_is_refused_rather_than_wrong(restore: str) -> None:
    layer, x_TM = _spread(restore, listed=False, ranks=None), torch.randn(9, 6, requires_grad=True)
    (grad_TM,) = torch.autograd.grad(layer(x_TM)[0].square().sum(), x_TM, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad_TM.sum().backward()
