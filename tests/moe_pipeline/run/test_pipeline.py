"""The layer against loops over tokens: every chunk count, strategy, world size, gate and activation."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from closeness import assert_all_close
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from torch import Tensor
from torch.nn import functional

from moe_pipeline import FeedForwardExperts, Gate, GateConfig, MoELayer
from moe_pipeline.config import PipelineConfig
from moe_pipeline.dispatch import apply_experts, local_part
from moe_pipeline.gate import Assignment
from moe_pipeline.losses import RouterLosses
from moe_pipeline.reference import moe_layer
from moe_pipeline.run.buffers import Workspace
from moe_pipeline.run.ranks import ExpertRanks, expert_ranks
from moe_pipeline.run.runtime import Runtime

NUM_EXPERTS, WIDTH, HIDDEN = 4, 6, 10
GATES = {
    "top-2": GateConfig(num_experts=NUM_EXPERTS),
    "top-3": GateConfig(num_experts=NUM_EXPERTS, top_k=3, normalize=False),
    "capacity": GateConfig(num_experts=NUM_EXPERTS, capacity_factor=0.5),
    "switch": GateConfig(num_experts=NUM_EXPERTS, top_k=1, kind="switch", capacity_factor=1.25),
    "gshard": GateConfig(num_experts=NUM_EXPERTS, kind="gshard", capacity_factor=1.0),
    "expert choice": GateConfig(num_experts=NUM_EXPERTS, kind="expert_choice", capacity_factor=1.0),
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
    "tanh": torch.tanh,  # one the layer has no operations of its own for
}
EXPERTS = [("relu", False, True), ("gelu", False, False), ("silu", True, True), ("relu", True, False),
           ("gelu_tanh", True, True), ("tanh", False, True), ("tanh", True, False)]  # fmt: skip
RESTORES = ("none", "S1", "S2", "S3", "S4")
CHUNKS = range(1, 9)
TOKENS = (5, 0, 17, 1)  # of each rank: ragged, none, and fewer than chunks


def _experts(activation: str, gated: bool, bias: bool) -> FeedForwardExperts:
    torch.manual_seed(1)
    function = activation if activation != "tanh" else torch.tanh
    return FeedForwardExperts(NUM_EXPERTS, WIDTH, HIDDEN, activation=function, gated=gated, bias=bias)


def _gate(config: GateConfig) -> Gate:
    torch.manual_seed(2)
    gate = Gate(config, WIDTH).eval()
    torch.nn.init.normal_(gate.router.weight)
    return gate


def _tokens(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3 + rank)
    shape = (TOKENS[rank], WIDTH)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def _one_expert(experts: FeedForwardExperts, activation: str, e: int, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    up, down = experts.up, experts.down

    def expert(x_M: Tensor) -> Tensor:
        hidden = up.weight[e].to(dtype) @ x_M + (0 if up.bias is None else up.bias[e].to(dtype))
        if experts.gated:
            gate, linear = hidden.chunk(2)
            hidden = ACTIVATIONS[activation](gate) * linear
        else:
            hidden = ACTIVATIONS[activation](hidden)
        return down.weight[e].to(dtype) @ hidden + (0 if down.bias is None else down.bias[e].to(dtype))

    return expert


def _reference(
    gate: Gate, experts: FeedForwardExperts, activation: str, num_ranks: int, dtype: torch.dtype
) -> list[dict[str, Tensor]]:
    """Results of every rank; experts' gradients are those of the mean over ranks."""
    gate.zero_grad(), experts.zero_grad()
    results = []
    for rank in range(num_ranks):
        x_TM, grad_TM = _tokens(rank)
        x_TM = x_TM.to(dtype).requires_grad_()
        router = gate.router.weight.detach().to(dtype).requires_grad_()
        functions = [_one_expert(experts, activation, e, dtype) for e in range(NUM_EXPERTS)]
        y_TM = moe_layer(x_TM, x_TM @ router.t(), gate.config, functions)
        nothing = 0 * (x_TM.sum() + router.sum())  # a rank without tokens has gradients too
        ((y_TM * grad_TM.to(dtype)).sum() + nothing).backward()
        results.append({"y": y_TM.detach(), "x": x_TM.grad, "router": router.grad})
    for name, parameter in experts.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for result in results:
            result[name] = grad / num_ranks
    return results


def _layer(gate: Gate, experts: FeedForwardExperts, config: PipelineConfig, ranks: ExpertRanks | None) -> MoELayer:
    return MoELayer(gate, experts, pipeline=config, ranks=ranks)


def _run(layer: MoELayer, rank: int) -> dict[str, Tensor]:
    layer.zero_grad()
    x_TM, grad_TM = _tokens(rank)
    x_TM.requires_grad_()
    y_TM, _ = layer(x_TM)
    (y_TM * grad_TM).sum().backward()
    grads = {name: parameter.grad.clone() for name, parameter in layer.experts.named_parameters()}  # type: ignore[union-attr]
    return {"y": y_TM.detach(), "x": x_TM.grad, "router": layer.gate.router.weight.grad.clone(), **grads}  # type: ignore[dict-item,union-attr]


def _cases() -> Iterator[tuple[GateConfig, str, bool, bool]]:
    for index, gate in enumerate(GATES.values()):
        yield (gate, *EXPERTS[index % len(EXPERTS)])
    for kind in EXPERTS:
        yield (GATES["top-2"], *kind)


def _chunks(index: int, num_ranks: int) -> list[int]:
    """All chunk counts for the first case and in one process, two that change from case to case for the others."""
    if index == 0 or num_ranks == 1:
        return list(CHUNKS)
    return [1 + index % len(CHUNKS), 1 + (index + 4) % len(CHUNKS)]


def _mine(values: dict[str, Tensor], rank: int, num_ranks: int) -> dict[str, Tensor]:
    """A rank's share of what the reference has whole."""
    local = NUM_EXPERTS // num_ranks
    part = slice(rank * local, (rank + 1) * local)
    return {name: value[part] if name.startswith(("up.", "down.")) else value for name, value in values.items()}


def _references(num_ranks: int, path: Path) -> Path:
    """Results of every case and rank in float32 and float64, computed once and read by all ranks."""
    found = []
    for gate_config, activation, gated, bias in _cases():
        gate, whole = _gate(gate_config), _experts(activation, gated, bias)
        reference = _reference(gate, whole, activation, num_ranks, torch.float32)
        found.append((reference, _reference(gate.double(), whole.double(), activation, num_ranks, torch.float64)))
    torch.save(found, path)
    return path


def _check_all(rank: int, num_ranks: int, path: Path) -> None:
    ranks = expert_ranks() if num_ranks > 1 else None
    cases = zip(_cases(), torch.load(path, weights_only=True), strict=True)
    for index, ((gate_config, activation, gated, bias), expected) in enumerate(cases):
        gate = _gate(gate_config)
        reference, truth = (_mine(results[rank], rank, num_ranks) for results in expected)
        for num_chunks in _chunks(index, num_ranks):
            for restore in RESTORES:
                experts = _experts(activation, gated, bias)
                if ranks is not None:
                    local_part(experts, ranks)
                layer = _layer(gate, experts, PipelineConfig(num_chunks=num_chunks, restore=restore), ranks)
                actual = _run(layer, rank)
                assert_all_close(actual, reference, truth)
                if num_chunks in (1, 3):
                    again = _run(layer, rank)
                    assert all(torch.equal(actual[name], again[name]) for name in actual)


def test_one_process_equals_the_reference(tmp_path: Path) -> None:
    _check_all(0, 1, _references(1, tmp_path / "references"))


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_equal_the_reference(num_ranks: int, tmp_path: Path) -> None:
    run_ranks(num_ranks, _check_all, _references(num_ranks, tmp_path / "references"))


# Any routing, from whatever a gate could return

NO_LOSSES = RouterLosses(balance=torch.zeros(()), z=torch.zeros(()), importance=torch.zeros(()))
Entries = list[list[int]]  # token -> its experts, each once or more, or none


def _assignment(entries: Entries, weight_A: Tensor) -> Assignment:
    pairs = [(token, expert) for token, experts in enumerate(entries) for expert in experts]
    pairs_A2 = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
    return Assignment(
        token_A=pairs_A2[:, 0], expert_A=pairs_A2[:, 1], weight_A=weight_A, num_chosen=len(pairs), losses=NO_LOSSES
    )


def _leaves(entries: Entries, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, weights, and the gradient of y."""
    generator = torch.Generator().manual_seed(11 + rank)
    num_entries = sum(map(len, entries))
    x_TM, grad_TM = (torch.randn(len(entries), WIDTH, generator=generator).to(dtype) for _ in "ab")
    weight_A = torch.rand(num_entries, generator=generator).to(dtype)
    return x_TM.requires_grad_(), weight_A.requires_grad_(), grad_TM


def _routed(
    entries: Entries, experts: FeedForwardExperts, config: PipelineConfig, ranks: ExpertRanks | None, rank: int
) -> dict[str, Tensor]:
    x_TM, weight_A, grad_TM = _leaves(entries, rank, torch.float32)
    experts.zero_grad()
    y_TM, counts = apply_experts(
        x_TM, _assignment(entries, weight_A), experts, num_experts=NUM_EXPERTS, top_k=1, pipeline=config,
        runtime=Runtime(name="moe", ranks=ranks, workspace=Workspace()),
    )  # fmt: skip
    y_TM.backward(grad_TM)
    owners = [expert for experts_of_token in entries for expert in experts_of_token]
    assert counts == tuple(owners.count(expert) for expert in range(NUM_EXPERTS))
    grads = {name: parameter.grad.clone() for name, parameter in experts.named_parameters()}  # type: ignore[union-attr]
    return {"y": y_TM.detach(), "x": x_TM.grad, "weights": weight_A.grad, **grads}  # type: ignore[dict-item]


def _routed_by_hand(
    all_entries: list[Entries], experts: FeedForwardExperts, activation: str, dtype: torch.dtype
) -> list[dict[str, Tensor]]:
    """Results of every rank; experts' gradients are the sum over ranks."""
    experts.zero_grad()
    functions = [_one_expert(experts, activation, e, dtype) for e in range(NUM_EXPERTS)]
    results = []
    for rank, entries in enumerate(all_entries):
        x_TM, weight_A, grad_TM = _leaves(entries, rank, dtype)
        weights = iter(weight_A)
        rows = [
            sum((next(weights) * functions[expert](token_M) for expert in chosen), start=0 * token_M)
            for token_M, chosen in zip(x_TM, entries, strict=True)
        ]
        y_TM = torch.stack(rows) if rows else 0 * x_TM
        nothing = 0 * (x_TM.sum() + weight_A.sum() + sum(parameter.sum() for parameter in experts.parameters()))
        ((y_TM * grad_TM).sum() + nothing).backward()
        results.append({"y": y_TM.detach(), "x": x_TM.grad, "weights": weight_A.grad})
    grads = {name: parameter.grad.clone() for name, parameter in experts.named_parameters()}  # type: ignore[union-attr]
    return [{**result, **grads} for result in results]


def _check_routing(
    all_entries: list[Entries], activation: tuple[str, bool, bool], config: PipelineConfig, ranks: ExpertRanks | None
) -> None:
    num_ranks = len(all_entries)
    rank = 0 if ranks is None else ranks.rank
    whole = _experts(*activation)
    reference = _routed_by_hand(all_entries, whole, activation[0], torch.float32)[rank]
    truth = _routed_by_hand(all_entries, whole.double(), activation[0], torch.float64)[rank]
    experts = _experts(*activation)
    if ranks is not None:
        local_part(experts, ranks)
    actual = _routed(all_entries[rank], experts, config, ranks, rank)
    assert_all_close(actual, _mine(reference, rank, num_ranks), _mine(truth, rank, num_ranks))


ENTRIES = st.lists(st.lists(st.integers(0, NUM_EXPERTS - 1), max_size=3), max_size=8)
CONFIGS = st.builds(
    lambda num_chunks, restore, overlap, split: PipelineConfig(
        num_chunks=num_chunks, restore=restore, overlap=overlap, split=split, timeout_s=30
    ),
    st.integers(1, 8), st.sampled_from(RESTORES), st.booleans(), st.sampled_from(["tokens", "local"]),
)  # fmt: skip
CORNERS: dict[str, Entries] = {
    "all tokens to one expert": [[2]] * 7,
    "no tokens": [],
    "tokens without experts": [[], [], []],
    "fewer tokens than chunks": [[0, 1], [3]],
    "one token": [[1, 2]],
    "one token, one expert": [[3]],
    "one expert twice": [[1, 1], [0, 0, 0]],
}


@settings(max_examples=60)
@given(ENTRIES, CONFIGS, st.sampled_from(EXPERTS))
@example(CORNERS["all tokens to one expert"], PipelineConfig(num_chunks=8, restore="S3"), EXPERTS[0])
def test_any_routing_equals_a_loop(entries: Entries, config: PipelineConfig, kind: tuple[str, bool, bool]) -> None:
    _check_routing([entries], kind, config, None)


@pytest.mark.parametrize("name", CORNERS)
@pytest.mark.parametrize("restore", RESTORES)
def test_corners_of_routing_equal_a_loop(name: str, restore: str) -> None:
    for num_chunks in (1, 3, 8):
        config = PipelineConfig(num_chunks=num_chunks, restore=restore)  # type: ignore[arg-type]
        _check_routing([CORNERS[name]], EXPERTS[2], config, None)


def _check_routings_on_ranks(rank: int, num_ranks: int) -> None:
    """Every rank draws the same examples, for they come from one seed."""
    ranks = expert_ranks()
    pairs = itertools.product(CORNERS.values(), repeat=num_ranks)
    configs = itertools.cycle(
        PipelineConfig(num_chunks=num_chunks, restore=restore, split=split)  # type: ignore[arg-type]
        for num_chunks, restore, split in (
            (8, "none", "tokens"), (3, "S1", "local"), (2, "S2", "ranks"), (1, "S3", "tokens"), (5, "S4", "local"),
            (2, "none", "ranks"), (4, "S4", "tokens"), (2, "S1", "local"), (3, "S2", "tokens"),
        )
    )  # fmt: skip
    for entries, config, kind in zip(pairs, configs, itertools.cycle(EXPERTS), strict=False):
        _check_routing(list(entries), kind, config, ranks)

    @settings(max_examples=40, derandomize=True, database=None, deadline=None)
    @given(st.lists(ENTRIES, min_size=num_ranks, max_size=num_ranks), CONFIGS, st.sampled_from(EXPERTS))
    def any_routing(all_entries: list[Entries], config: PipelineConfig, kind: tuple[str, bool, bool]) -> None:
        _check_routing(all_entries, kind, config, ranks)

    any_routing()


def test_any_routing_on_two_ranks_equals_a_loop() -> None:
    run_ranks(2, _check_routings_on_ranks)
