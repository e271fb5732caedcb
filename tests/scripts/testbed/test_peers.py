"""All peers compute one function: that of a plain loop over tokens' experts."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from closeness import assert_all_close
from ranks import run_ranks
from torch import Tensor
from torch.nn import functional

from scripts.testbed.peers import (
    MoESizes,
    PeerLayer,
    copy_weights,
    deepspeed_layer,
    draw_weights,
    gradients,
    hugging_face,
)

SIZES = MoESizes(num_experts=4, top_k=2, d_model=12, d_hidden=8, gated=True, activation="silu")
NUM_TOKENS = 13
PEERS: dict[str, Callable[[MoESizes], PeerLayer]] = {
    "transformers eager": lambda sizes: hugging_face(sizes, implementation="eager", seed=1),
    "transformers grouped_mm": lambda sizes: hugging_face(sizes, implementation="grouped_mm", seed=1),
    "deepspeed": lambda sizes: deepspeed_layer(sizes, ep_size=1, seed=1),
}


def plain_loop(x_TM: Tensor, sizes: MoESizes, router_EM: Tensor, up_EHM: Tensor, down_EMH: Tensor) -> Tensor:
    """One token at a time, one expert at a time."""
    activation = {"relu": functional.relu, "gelu": functional.gelu, "silu": functional.silu}[sizes.activation]
    weight_TK, expert_TK = (x_TM @ router_EM.t()).softmax(-1).topk(sizes.top_k)
    if sizes.top_k > 1:
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
    y_TM = []
    for x_M, weight_K, expert_K in zip(x_TM, weight_TK, expert_TK, strict=True):
        y_M = torch.zeros_like(x_M)
        for weight, e in zip(weight_K, expert_K.tolist(), strict=True):
            hidden_H = up_EHM[e] @ x_M
            if sizes.gated:
                gate_H, hidden_H = hidden_H.chunk(2)
                hidden_H = activation(gate_H) * hidden_H
            else:
                hidden_H = activation(hidden_H)
            y_M = y_M + weight * (down_EMH[e] @ hidden_H)
        y_TM.append(y_M)
    return torch.stack(y_TM)


def inputs(num_tokens: int = NUM_TOKENS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x_TM, dy_TM = torch.randn(2, num_tokens, SIZES.d_model, generator=generator)
    return x_TM, dy_TM


def expected(sizes: MoESizes, x_TM: Tensor, dy_TM: Tensor, dtype: torch.dtype, *, seed: int = 1) -> dict[str, Tensor]:
    weights = {name: each.to(dtype).requires_grad_() for name, each in draw_weights(sizes, seed=seed).items()}
    x_TM = x_TM.to(dtype).requires_grad_()
    y_TM = plain_loop(x_TM, sizes, **weights)
    grads = torch.autograd.grad(y_TM, [x_TM, *weights.values()], dy_TM.to(dtype), materialize_grads=True)
    return {"y_TM": y_TM.detach(), **dict(zip(["x_TM", *weights], grads, strict=True))}


def computed(layer: PeerLayer, x_TM: Tensor, dy_TM: Tensor) -> dict[str, Tensor]:
    x_TM = x_TM.clone().requires_grad_()
    y_TM = layer(x_TM)
    y_TM.backward(dy_TM)
    assert x_TM.grad is not None
    return {"y_TM": y_TM.detach(), "x_TM": x_TM.grad, **gradients(layer)}


def check(actual: dict[str, Tensor], sizes: MoESizes, x_TM: Tensor, dy_TM: Tensor, *, seed: int = 1) -> None:
    reference, truth = (expected(sizes, x_TM, dy_TM, dtype, seed=seed) for dtype in (torch.float32, torch.float64))
    assert_all_close(actual, reference, truth)


@pytest.mark.parametrize("num_tokens", [NUM_TOKENS, 1])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("peer", PEERS)
def test_a_peer_is_the_plain_loop(peer: str, top_k: int, num_tokens: int) -> None:
    sizes = replace(SIZES, top_k=top_k)
    x_TM, dy_TM = inputs(num_tokens)
    check(computed(PEERS[peer](sizes), x_TM, dy_TM), sizes, x_TM, dy_TM)
    assert not dist.is_initialized()


@pytest.mark.parametrize("peer", PEERS)
def test_no_tokens_come_out_as_none(peer: str) -> None:
    assert PEERS[peer](SIZES)(torch.empty(0, SIZES.d_model)).shape == (0, SIZES.d_model)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("peer", PEERS)
def test_activations_are_the_same_everywhere(peer: str, activation: str) -> None:
    sizes = replace(SIZES, activation=activation)
    check(computed(PEERS[peer](sizes), *inputs()), sizes, *inputs())


@pytest.mark.parametrize("top_k", [1, 2])
def test_deepspeed_takes_experts_without_a_gate(top_k: int) -> None:
    sizes = replace(SIZES, top_k=top_k, gated=False, activation="relu")
    check(computed(deepspeed_layer(sizes, ep_size=1, seed=1), *inputs()), sizes, *inputs())


@pytest.mark.parametrize("peer", PEERS)
def test_copied_weights_are_the_ones_used(peer: str) -> None:
    layer = PEERS[peer](SIZES)
    copy_weights(layer, **draw_weights(SIZES, seed=3))
    check(computed(layer, *inputs()), SIZES, *inputs(), seed=3)
    wrong = {**draw_weights(SIZES, seed=3), "down_EMH": torch.zeros(4, 8, 12)}
    with pytest.raises(ValueError, match=r"down_EMH: got shape \(4, 8, 12\), accepts \(4, 12, 8\)"):
        copy_weights(layer, **wrong)


def test_the_librarys_own_functions_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    calls: list[str] = []
    own = ALL_EXPERTS_FUNCTIONS["grouped_mm"]

    def counted(*arguments: Tensor) -> Tensor:
        calls.append("grouped_mm")
        return own(*arguments)

    monkeypatch.setitem(type(ALL_EXPERTS_FUNCTIONS)._global_mapping, "grouped_mm", counted)
    PEERS["transformers eager"](SIZES)(inputs()[0])
    assert not calls
    PEERS["transformers grouped_mm"](SIZES)(inputs()[0])
    assert calls == ["grouped_mm"]


def test_wrong_sizes_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="gated: got False"):
        hugging_face(replace(SIZES, gated=False), implementation="eager", seed=0)
    with pytest.raises(ValueError, match="implementation: got 'fast'"):
        hugging_face(SIZES, implementation="fast", seed=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"ep_size: got 2, accepts .* which is 1: .*init_process_group"):
        deepspeed_layer(SIZES, ep_size=2, seed=0)
    with pytest.raises(ValueError, match="top_k: got 5, accepts at most num_experts=4"):
        replace(SIZES, top_k=5)
    with pytest.raises(ValueError, match="d_hidden: got 0"):
        replace(SIZES, d_hidden=0)


def shared_experts(rank: int, world_size: int) -> None:
    for top_k in (1, 2):
        sizes = replace(SIZES, top_k=top_k)
        x_TM, dy_TM = inputs(world_size * 7)
        mine = slice(rank * 7, (rank + 1) * 7)
        layer = deepspeed_layer(sizes, ep_size=world_size, seed=1)
        actual = computed(layer, x_TM[mine], dy_TM[mine])
        dist.all_reduce(actual["router_EM"])  # each rank's router saw its own tokens; an expert saw all ranks'
        held = slice(rank * 4 // world_size, (rank + 1) * 4 // world_size)
        assert layer.first_expert == held.start
        taken = {"y_TM": mine, "x_TM": mine, "up_EHM": held, "down_EMH": held}
        reference, truth = (expected(sizes, x_TM, dy_TM, dtype) for dtype in (torch.float32, torch.float64))
        for results in (reference, truth):
            results.update({name: results[name][part] for name, part in taken.items()})
        assert_all_close(actual, reference, truth)


def test_deepspeed_on_two_ranks_is_deepspeed_on_one() -> None:
    run_ranks(2, shared_experts)
