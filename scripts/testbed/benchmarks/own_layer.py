"""Our MoE layer with given sizes and the weights its peers start from."""

import time
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

import moe_pipeline
from configs.sections import BenchConfig, LayerSizes
from moe_pipeline import PipelineConfig
from moe_pipeline.dispatch import local_part
from moe_pipeline.plan.ledger import LayerShape
from moe_pipeline.plan.rings import HiddenShape
from moe_pipeline.run.buffers import Workspace
from moe_pipeline.run.ranks import ExpertRanks
from scripts.testbed.peers import Activation, MoESizes, draw_weights


def sizes_of(layer: BenchConfig | LayerSizes, *, gated: bool = False, activation: Activation = "relu") -> MoESizes:
    """Sizes of a configuration as layers take them.

    Args:
        layer: A section that names experts and widths.
        gated: Whether experts are gated.
        activation: Between an expert's two products.
    """
    return MoESizes(
        num_experts=layer.num_experts,
        top_k=layer.top_k,
        d_model=layer.d_model,
        d_hidden=layer.d_hidden,
        gated=gated,
        activation=activation,
    )


def layer_shape(sizes: MoESizes, *, num_tokens: int, num_ranks: int, element_bytes: int = 4) -> LayerShape:
    """Sizes of a layer as plans take them.

    Args:
        sizes: Over all ranks.
        num_tokens: Of each rank.
        num_ranks: Ranks that share the experts.
        element_bytes: Bytes of an element.
    """
    in_place = sizes.activation == "relu" and not sizes.gated
    return LayerShape(
        tokens=num_tokens,
        top_k=sizes.top_k,
        d_model=sizes.d_model,
        hidden=HiddenShape(d_hidden=sizes.d_hidden, gated=sizes.gated, in_place=in_place),
        num_experts=sizes.num_experts,
        num_ranks=num_ranks,
        element_bytes=element_bytes,
    )


def own_layer(
    sizes: MoESizes,
    *,
    seed: int,
    pipeline: PipelineConfig | None = None,
    ranks: ExpertRanks | None = None,
    workspace: Workspace | None = None,
    name: str = "moe",
) -> moe_pipeline.MoELayer:
    """Build the layer; with ranks it holds this rank's share of the experts.

    Args:
        sizes: Sizes, over all ranks.
        seed: Seed of the weights, as in `draw_weights`.
        pipeline: Chunks, and what is kept for backward.
        ranks: Who shares the experts.
        workspace: Memory shared with other layers.
        name: The layer's name.
    """
    gate = moe_pipeline.Gate(
        moe_pipeline.GateConfig(
            num_experts=sizes.num_experts, top_k=sizes.top_k, normalize=sizes.top_k > 1, balance_weight=0.0
        ),
        sizes.d_model,
    )
    experts = moe_pipeline.FeedForwardExperts(
        sizes.num_experts,
        sizes.d_model,
        sizes.d_hidden,
        activation=sizes.activation,
        gated=sizes.gated,
        bias=False,
    )
    weights = draw_weights(sizes, seed=seed)
    with torch.no_grad():
        gate.router.weight.copy_(weights["router_EM"])
        experts.up.weight.copy_(weights["up_EHM"])
        experts.down.weight.copy_(weights["down_EMH"])
    if ranks is not None:
        local_part(experts, ranks)
    return moe_pipeline.MoELayer(gate, experts, pipeline=pipeline, ranks=ranks, workspace=workspace, name=name)


def step(layer: nn.Module, x_TM: Tensor, grad_TM: Tensor) -> None:
    """One forward and backward with a given gradient of the output.

    Args:
        layer: Ours, which returns (y, record), or a peer, which returns y.
        x_TM: Tokens.
        grad_TM: Gradient of y.
    """
    layer.zero_grad(set_to_none=True)
    result = layer(x_TM.detach().requires_grad_())
    y_TM = result[0] if isinstance(result, tuple) else result
    y_TM.backward(grad_TM)


def alternate(steps: Mapping[str, Callable[[], None]], *, repeats: int, warmup: int) -> dict[str, list[float]]:
    """Time steps on all ranks: every provider once a round, every second round in reverse order, together.

    Args:
        steps: Provider -> what to time.
        repeats: Timed rounds.
        warmup: Rounds before them.

    Returns:
        Provider -> the slowest rank's time of every timed round, in microseconds.
    """
    names = list(steps)
    local_us = torch.zeros(len(names), warmup + repeats, dtype=torch.float64)
    for round_number in range(warmup + repeats):
        order = range(len(names)) if round_number % 2 else reversed(range(len(names)))
        for index in order:
            dist.barrier()
            start_ns = time.perf_counter_ns()
            steps[names[index]]()
            local_us[index, round_number] = (time.perf_counter_ns() - start_ns) / 1e3
    dist.all_reduce(local_us, dist.ReduceOp.MAX)
    return {name: local_us[index, warmup:].tolist() for index, name in enumerate(names)}
