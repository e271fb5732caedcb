"""Experts of every kind give what calling them on sorted rows gives; the fast path is taken only where it may be."""

import copy
from collections.abc import Callable

import pytest
import torch
from closeness import assert_all_close, assert_close
from torch import Tensor, nn

from moe_pipeline import FeedForwardExperts, Gate, GateConfig, ModuleExperts, MoELayer, PipelineConfig
from moe_pipeline.dispatch import apply_experts, local_part
from moe_pipeline.experts import GroupedLinear
from moe_pipeline.gate import Assignment
from moe_pipeline.run.buffers import Workspace
from moe_pipeline.run.ranks import ExpertRanks
from moe_pipeline.run.runtime import Runtime

NUM_EXPERTS, WIDTH, HIDDEN, TOKENS = 4, 6, 10, 15
RESTORES = ("none", "S1", "S2", "S3", "S4")


def _gate() -> Gate:
    gate = Gate(GateConfig(num_experts=NUM_EXPERTS), WIDTH)
    gate.router.weight.data *= 30
    return gate


def _feed_forward(**options: object) -> FeedForwardExperts:
    return FeedForwardExperts(NUM_EXPERTS, WIDTH, HIDDEN, **options)  # type: ignore[arg-type]


def _modules() -> ModuleExperts:
    return ModuleExperts(
        [nn.Sequential(nn.Linear(WIDTH, 7), nn.Tanh(), nn.Linear(7, WIDTH)) for _ in range(NUM_EXPERTS)]
    )


def _by_call(x_TM: Tensor, assignment: Assignment, experts: nn.Module, dtype: torch.dtype) -> Tensor:
    """The meaning of it all: call the experts once with rows sorted by expert, add up what comes back."""
    order_A = assignment.expert_A.argsort(stable=True)
    token_A, weight_A = assignment.token_A[order_A], assignment.weight_A[order_A]
    counts = torch.bincount(assignment.expert_A, minlength=NUM_EXPERTS).tolist()
    rows_AM = experts(x_TM[token_A], tuple(counts))
    wide = torch.promote_types(rows_AM.dtype, weight_A.dtype)
    y_TM = torch.zeros(x_TM.shape, dtype=wide).index_add(0, token_A, rows_AM.to(wide) * weight_A[:, None].to(wide))
    return y_TM.to(dtype)


def _run(experts: nn.Module, to: torch.dtype, config: PipelineConfig | None, **options: object) -> dict[str, Tensor]:
    """Results and gradients of a layer (or, without a config, of its meaning), random numbers from one seed."""
    torch.manual_seed(4)
    gate = _gate().to(to)
    x_TM, grad_TM = torch.randn(TOKENS, WIDTH).to(to).requires_grad_(), torch.randn(TOKENS, WIDTH)
    experts = experts.to(to)
    experts.zero_grad()
    torch.manual_seed(5)  # what dropout draws
    if config is None:
        y_TM = _by_call(x_TM, gate(x_TM), experts, to)
    else:
        y_TM, _ = MoELayer(gate, experts, pipeline=config, **options)(x_TM)  # type: ignore[arg-type]
    y_TM.backward(grad_TM.to(y_TM.dtype))
    grads = {name: parameter.grad for name, parameter in experts.named_parameters() if parameter.grad is not None}
    result = {"y": y_TM.detach(), "x": x_TM.grad, "router": gate.router.weight.grad, **grads}
    return {name: value.clone() for name, value in result.items()}  # type: ignore[union-attr]


def _check(make: Callable[[], nn.Module], *, chunks: tuple[int, ...] = (1, 3)) -> None:
    torch.manual_seed(1)
    experts = make()
    reference = _run(copy.deepcopy(experts), torch.float32, None)
    truth = _run(copy.deepcopy(experts), torch.float64, None)
    for restore in RESTORES:
        for num_chunks in chunks:
            config = PipelineConfig(num_chunks=num_chunks, restore=restore)  # type: ignore[arg-type]
            assert_all_close(_run(copy.deepcopy(experts), torch.float32, config), reference, truth)


@pytest.mark.parametrize("make", [_feed_forward, _modules, lambda: _feed_forward(activation="silu", gated=True)])
def test_equals_a_call_with_sorted_rows(make: Callable[[], nn.Module]) -> None:
    _check(make)


class _Doubled(FeedForwardExperts):
    def forward(self, rows_RM: Tensor, counts: tuple[int, ...]) -> Tensor:
        return 2 * super().forward(rows_RM, counts)


class _Adapted(nn.Module):
    """A grouped linear with something added to it, as adapters for fine-tuning are."""

    def __init__(self, base: GroupedLinear) -> None:
        super().__init__()
        self.base = base
        self.weight, self.bias = base.weight, base.bias
        self.scale = nn.Parameter(torch.full((base.d_out,), 0.5))

    def forward(self, rows_RI: Tensor, counts: tuple[int, ...]) -> Tensor:
        return self.base(rows_RI, counts) * (1 + self.scale)


def _adapted() -> FeedForwardExperts:
    experts = _feed_forward()
    experts.up = _Adapted(experts.up)  # type: ignore[assignment]
    return experts


class _OfTheirOwn(nn.Module):
    """Experts of no known kind."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = NUM_EXPERTS
        self.scale = nn.Parameter(torch.randn(NUM_EXPERTS, WIDTH))

    def forward(self, rows_RM: Tensor, counts: tuple[int, ...]) -> Tensor:
        owner_R = torch.arange(NUM_EXPERTS).repeat_interleave(torch.tensor(counts))
        return (rows_RM * self.scale[owner_R]).sin()


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "a subclass with its own forward": lambda: _Doubled(NUM_EXPERTS, WIDTH, HIDDEN),
    "an adapter around a map": _adapted,
    "an activation with parameters": lambda: _feed_forward(activation=nn.PReLU()),
    "an activation that works in place": lambda: _feed_forward(activation=nn.ELU(inplace=True)),
    "a known activation that works in place": lambda: _feed_forward(activation=nn.ReLU(inplace=True)),
    "experts of their own kind": _OfTheirOwn,
}


@pytest.mark.parametrize("kind", OTHERS)
def test_whatever_experts_do_is_done(kind: str) -> None:
    _check(OTHERS[kind])


class _Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand_like(x)


def test_an_activation_that_draws_random_numbers_draws_them_once() -> None:
    """With one chunk the draws are those of one call, so results and gradients can be told."""
    torch.manual_seed(1)
    experts = _feed_forward(activation=_Noisy())
    reference = _run(experts, torch.float32, None)
    for restore in RESTORES:
        actual = _run(experts, torch.float32, PipelineConfig(restore=restore))  # type: ignore[arg-type]
        assert_all_close(actual, reference, reference)


@pytest.mark.parametrize("switch", ["training", "dropout alone"])
def test_dropout_that_is_on_drops_and_its_gradients_know_what_was_dropped(switch: str) -> None:
    torch.manual_seed(1)
    experts = _feed_forward(dropout=0.5)
    if switch == "dropout alone":  # uncertainty by dropout at test time
        experts.eval()
        experts.dropout.train()
    reference = _run(experts, torch.float32, None)
    for restore in RESTORES:
        actual = _run(experts, torch.float32, PipelineConfig(restore=restore))  # type: ignore[arg-type]
        assert_all_close(actual, reference, reference)
    dropout, experts.dropout = experts.dropout, nn.Dropout(0.0)
    without = _run(experts, torch.float32, None)
    experts.dropout = dropout
    assert not torch.equal(without["y"], reference["y"])  # something was dropped


def test_dropout_that_is_off_drops_nothing() -> None:
    torch.manual_seed(1)
    dropping = _feed_forward(dropout=0.5).eval()
    torch.manual_seed(1)
    plain = _feed_forward()
    first, second = (_run(experts, torch.float32, PipelineConfig(num_chunks=2)) for experts in (dropping, plain))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
@pytest.mark.parametrize("where", ["", "up", "down", "dropout"])
def test_hooks_on_experts_are_called_and_change_no_result(kind: str, where: str) -> None:
    torch.manual_seed(1)
    experts = _feed_forward()
    plain = _run(copy.deepcopy(experts), torch.float32, PipelineConfig(num_chunks=3))
    truth = _run(copy.deepcopy(experts), torch.float64, None)
    calls = []
    register = getattr(experts.get_submodule(where), f"register_{kind}_hook")
    handle = register(lambda module, *values: calls.append(module))
    hooked = _run(experts.float(), torch.float32, PipelineConfig(num_chunks=3))
    assert len(calls) == 3  # once per chunk
    assert_all_close(hooked, plain, truth)
    handle.remove()
    _run(experts, torch.float32, PipelineConfig(num_chunks=3))
    assert len(calls) == 3


def _autocast(experts: nn.Module, config: PipelineConfig | None) -> dict[str, Tensor]:
    torch.manual_seed(4)
    gate = _gate()
    x_TM, grad_TM = torch.randn(TOKENS, WIDTH).requires_grad_(), torch.randn(TOKENS, WIDTH)
    experts.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if config is None:
            y_TM = _by_call(x_TM, gate(x_TM), experts, torch.bfloat16)
        else:
            y_TM, _ = MoELayer(gate, experts, pipeline=config)(x_TM)
    y_TM.backward(grad_TM.to(y_TM.dtype))
    grads = {name: parameter.grad.clone() for name, parameter in experts.named_parameters()}  # type: ignore[union-attr]
    return {"y": y_TM.detach(), "x": x_TM.grad, "router": gate.router.weight.grad, **grads}  # type: ignore[dict-item]


@pytest.mark.parametrize("restore", RESTORES)
def test_autocast_computes_in_its_dtype_and_gradients_reach_float32_parameters(restore: str) -> None:
    torch.manual_seed(1)
    experts = _feed_forward()
    truth = _run(copy.deepcopy(experts), torch.float64, None)
    reference = _autocast(experts, None)
    for num_chunks in (1, 3):
        actual = _autocast(experts, PipelineConfig(num_chunks=num_chunks, restore=restore))  # type: ignore[arg-type]
        assert actual["y"].dtype == torch.bfloat16
        assert actual["up.weight"].dtype == torch.float32
        assert_all_close(actual, reference, truth)


def test_a_hook_changes_no_dtype_under_autocast() -> None:
    torch.manual_seed(1)
    experts = _feed_forward()
    truth = _run(copy.deepcopy(experts), torch.float64, None)
    plain = _autocast(experts, PipelineConfig(num_chunks=2))
    experts.up.register_forward_hook(lambda module, args, output: None)
    hooked = _autocast(experts, PipelineConfig(num_chunks=2))
    assert hooked["y"].dtype == plain["y"].dtype == torch.bfloat16
    assert_all_close(hooked, plain, truth)


@pytest.mark.parametrize("restore", RESTORES)
@pytest.mark.parametrize("make", [_feed_forward, _modules, lambda: _feed_forward(bias=False, gated=True)])
def test_frozen_parameters_get_no_gradient_and_the_others_theirs(make: Callable[[], nn.Module], restore: str) -> None:
    torch.manual_seed(1)
    experts = make()
    config = PipelineConfig(num_chunks=2, restore=restore)  # type: ignore[arg-type]
    everything, truth = _run(experts, torch.float32, config), _run(copy.deepcopy(experts), torch.float64, None)
    experts.float()
    parameters = dict(experts.named_parameters())
    for frozen in ([name] for name in parameters):
        for name, parameter in parameters.items():
            parameter.requires_grad_(name not in frozen)
        some = _run(experts, torch.float32, config)
        assert set(everything) - set(some) == set(frozen)
        assert_all_close(some, *({name: values[name] for name in some} for values in (everything, truth)))
    experts.requires_grad_(False)
    assert set(_run(experts, torch.float32, config)) == {"y", "x", "router"}


@pytest.mark.parametrize("restore", RESTORES)
@pytest.mark.parametrize("make", [_feed_forward, _modules])
def test_without_a_gradient_nothing_is_kept(make: Callable[[], nn.Module], restore: str) -> None:
    experts, workspace = make(), Workspace()
    layer = MoELayer(_gate(), experts, pipeline=PipelineConfig(num_chunks=2, restore=restore), workspace=workspace)  # type: ignore[arg-type]
    x_TM = torch.randn(TOKENS, WIDTH)
    trained, _ = layer(x_TM)
    del trained
    cpu = torch.device("cpu")
    host_bytes = workspace.free_bytes(cpu, host=True)
    with torch.no_grad():
        y_TM, _ = layer(x_TM)
    with torch.inference_mode():
        again_TM, _ = layer(x_TM)
    assert not y_TM.requires_grad
    assert torch.equal(y_TM, again_TM)
    assert workspace.free_bytes(cpu, host=True) == host_bytes
    assert_close("y", y_TM, layer(x_TM)[0].detach(), layer(x_TM)[0].detach())


@pytest.mark.parametrize("wanted", ["x", "router", "experts"])
@pytest.mark.parametrize("make", [_feed_forward, _modules])
def test_any_one_of_the_inputs_may_be_the_only_one_to_learn(make: Callable[[], nn.Module], wanted: str) -> None:
    torch.manual_seed(1)
    experts, gate = make(), _gate()
    x_TM = torch.randn(TOKENS, WIDTH)
    config = PipelineConfig(num_chunks=2, restore="S4")
    leaves = {"x": x_TM, "router": gate.router.weight, **dict(experts.named_parameters())}

    def run(*chosen: str) -> dict[str, Tensor]:
        for name, leaf in leaves.items():
            leaf.grad = None
            leaf.requires_grad_(name in chosen or ("experts" in chosen and name not in ("x", "router")))
        MoELayer(gate, experts, pipeline=config)(x_TM)[0].square().sum().backward()
        return {name: leaf.grad.clone() for name, leaf in leaves.items() if leaf.grad is not None}

    everything, alone = run("x", "router", "experts"), run(wanted)
    expected = {wanted} if wanted != "experts" else set(leaves) - {"x", "router"}
    assert set(alone) == expected
    assert all(torch.equal(alone[name], everything[name]) for name in alone)


def test_counts_are_the_rows_of_every_expert() -> None:
    gate, x_TM = _gate(), torch.randn(TOKENS, WIDTH)
    assignment = gate(x_TM)
    y_TM, counts = apply_experts(
        x_TM,
        assignment,
        _feed_forward(),
        num_experts=NUM_EXPERTS,
        top_k=assignment.num_chosen // TOKENS,
        pipeline=PipelineConfig(num_chunks=3),
        runtime=Runtime(name="moe", ranks=None, workspace=Workspace()),
    )
    owners = assignment.expert_A.tolist()
    assert counts == tuple(owners.count(expert) for expert in range(NUM_EXPERTS))
    assert y_TM.shape == x_TM.shape


class _Fixed(ExpertRanks):
    """Ranks without processes."""

    def __init__(self, rank: int, size: int) -> None:
        object.__setattr__(self, "_place", (rank, size))

    @property
    def rank(self) -> int:
        return self._place[0]  # type: ignore[attr-defined]

    @property
    def size(self) -> int:
        return self._place[1]  # type: ignore[attr-defined]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_parts_of_feed_forward_experts_make_up_the_whole(size: int, bias: bool) -> None:
    whole = _feed_forward(bias=bias)
    parts = [local_part(copy.deepcopy(whole), _Fixed(rank, size)) for rank in range(size)]
    assert {part.num_experts for part in parts} == {NUM_EXPERTS // size}
    for name, parameter in whole.named_parameters():
        assert torch.equal(torch.cat([part.get_parameter(name) for part in parts]), parameter)
    counts = (3,) * (NUM_EXPERTS // size)
    rows_RM = torch.randn(12, WIDTH)
    results = [part(rows, counts) for part, rows in zip(parts, rows_RM.chunk(size), strict=True)]
    assert_close("rows", torch.cat(results), whole(rows_RM, (3, 3, 3, 3)), whole(rows_RM, (3, 3, 3, 3)))


def test_a_part_owns_its_memory() -> None:
    whole = _feed_forward()
    part = local_part(whole, _Fixed(1, 2))
    assert part is whole
    for parameter in part.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_parts_of_modules_are_the_modules(size: int) -> None:
    modules = list(_modules().experts)
    parts = [local_part(ModuleExperts(modules), _Fixed(rank, size)) for rank in range(size)]
    found = [module for part in parts for module in part.experts]  # type: ignore[union-attr]
    assert all(one is other for one, other in zip(found, modules, strict=True))
    assert {part.num_experts for part in parts} == {NUM_EXPERTS // size}


def test_local_part_refuses() -> None:
    with pytest.raises(TypeError, match="experts: got _OfTheirOwn; accepted are FeedForwardExperts and ModuleExperts"):
        local_part(_OfTheirOwn(), _Fixed(0, 2))
    with pytest.raises(ValueError, match="num_experts: got 4 for 3 ranks; accepted is a multiple of 3"):
        local_part(_feed_forward(), _Fixed(0, 3))
