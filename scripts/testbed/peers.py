"""MoE layers of other libraries, with given sizes and given weights, to stand beside ours in a comparison.

Every layer here maps x_TM to y_TM and computes one function: each token goes to its top_k experts, none is dropped, and
an expert's output is weighted by its softmax probability as it is where top_k is 1, and divided by the sum over the
token's chosen experts where top_k is more. That is what DeepSpeed has built in; the Hugging Face layer is configured to
it. There are no biases and no noise, and no balancing loss comes out.

Legend: T tokens, E experts, M model width, H rows of the first product: d_hidden, or 2 * d_hidden with a gate.
"""

import contextlib
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

Activation = Literal["relu", "gelu", "silu"]


@dataclass(frozen=True, kw_only=True)
class MoESizes:
    """The sizes of one MoE layer.

    Raises:
        ValueError: If a number is not positive, or top_k exceeds num_experts.
    """

    num_experts: int
    """E, over all ranks."""
    top_k: int
    d_model: int
    d_hidden: int
    gated: bool
    """Whether an expert is down(activation(gate(x)) * up(x)), rather than down(activation(up(x)))."""
    activation: Activation

    def __post_init__(self) -> None:
        for name in ("num_experts", "top_k", "d_model", "d_hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, accepts 1 or more")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k: got {self.top_k}, accepts at most num_experts={self.num_experts}")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The weights of all experts: the router's, both products', with a gate's rows first in up_EHM."""
        E, M, H = self.num_experts, self.d_model, self.d_hidden * (2 if self.gated else 1)
        return {"router_EM": (E, M), "up_EHM": (E, H, M), "down_EMH": (E, M, self.d_hidden)}


class PeerLayer(nn.Module, ABC):
    """What `hugging_face` and `deepspeed_layer` return: a library's own module, with common names for its weights.

    `first_expert` is the first of the experts that this process holds.
    """

    def __init__(self, inner: nn.Module, sizes: MoESizes, *, first_expert: int) -> None:
        super().__init__()
        self.inner = inner
        self.sizes = sizes
        self.first_expert = first_expert

    @abstractmethod
    def forward(self, x_TM: Tensor) -> Tensor:
        """Apply the layer and return y_TM."""

    @abstractmethod
    def parts(self) -> dict[str, Sequence[nn.Parameter]]:
        """The parameters under each name of `MoESizes.shapes`: one that holds all local experts, or one for each."""


def draw_weights(sizes: MoESizes, *, seed: int) -> dict[str, Tensor]:
    """Draw the weights of all experts in float32, uniform as `nn.Linear` does, the same on every rank.

    Returns:
        Name -> tensor, as `copy_weights` takes them.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.empty(shape).uniform_(-(shape[-1] ** -0.5), shape[-1] ** -0.5, generator=generator)
        for name, shape in sizes.shapes().items()
    }


def copy_weights(layer: PeerLayer, *, router_EM: Tensor, up_EHM: Tensor, down_EMH: Tensor) -> None:
    """Set a layer's weights; each process takes its own experts out of all.

    Args:
        layer: Whose weights; their dtype and device stay.
        router_EM: The router's weight.
        up_EHM: The first product's, with a gate's rows before the others.
        down_EMH: The second product's.

    Raises:
        ValueError: If a tensor's shape is not that of `MoESizes.shapes`.
    """
    weights = {"router_EM": router_EM, "up_EHM": up_EHM, "down_EMH": down_EMH}
    for name, shape in layer.sizes.shapes().items():
        if weights[name].shape != shape:
            raise ValueError(f"{name}: got shape {tuple(weights[name].shape)}, accepts {shape}")
    with torch.no_grad():
        for name, parameters in layer.parts().items():
            start = 0 if name == "router_EM" else layer.first_expert
            for parameter in parameters:
                rows = parameter.numel() // weights[name][0].numel()
                parameter.copy_(weights[name][start : start + rows].view(parameter.shape))
                start += rows


def gradients(layer: PeerLayer) -> dict[str, Tensor]:
    """The gradients of a layer's weights, in the shapes of `MoESizes.shapes` but with the local experts alone.

    Returns:
        Name -> gradient, after a backward; zeros for an expert that no token went to.
    """
    found = {}
    for name, parameters in layer.parts().items():
        row = layer.sizes.shapes()[name][1:]
        grads = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
        found[name] = torch.cat([grad.view(-1, *row) for grad in grads])
    return found


def hugging_face(sizes: MoESizes, *, implementation: Literal["eager", "grouped_mm"], seed: int) -> PeerLayer:
    """Build the MoE block of Qwen3-MoE in transformers, which runs as the library wrote it.

    Its experts are the library's common design (Mixtral and OLMoE have the same code). Its router is one that can
    leave a single expert's probability as it is (`norm_topk_prob`); Mixtral's makes it a constant 1 without gradient.

    Args:
        sizes: With gated=True: the library has no other experts of this design.
        implementation: "eager" loops over the experts; "grouped_mm" sorts the rows and calls torch's `grouped_mm`, for
            which d_model and d_hidden must be multiples of 16 bytes: of 4 in float32, of 8 in bfloat16.
        seed: Of the weights: `draw_weights`.

    Returns:
        A layer for one process.

    Raises:
        ValueError: If the experts are not gated, or the implementation is another.
    """
    if not sizes.gated:
        raise ValueError("gated: got False, accepts True here: the experts of transformers' MoE blocks are gated")
    if implementation not in ("eager", "grouped_mm"):
        raise ValueError(f"implementation: got {implementation!r}, accepts 'eager' or 'grouped_mm'")
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=sizes.d_model,
        moe_intermediate_size=sizes.d_hidden,
        num_experts=sizes.num_experts,
        num_experts_per_tok=sizes.top_k,
        norm_topk_prob=sizes.top_k > 1,
        hidden_act=sizes.activation,
        experts_implementation=implementation,
    )
    layer = _HuggingFace(Qwen3MoeSparseMoeBlock(config), sizes, first_expert=0)
    copy_weights(layer, **draw_weights(sizes, seed=seed))
    return layer


def deepspeed_layer(sizes: MoESizes, *, ep_size: int, seed: int) -> PeerLayer:
    """Build `deepspeed.moe.layer.MoE` around plain linear layers, dropless and without noise.

    Its combine weights (deepspeed/moe/sharded_moe.py): `top1gating` takes the probability as it is; `top2gating` and,
    from top_k=3 on, `topkgating` divide by the sum over the chosen. The router computes in float32 in any dtype.

    With ep_size=1 it needs no process group, and makes none. With more, the caller has initialised one through torch
    and all its ranks call this together. Every expert's rows are then padded to the most that any expert has, on any
    rank; `top1gating` bounds those by the rank's own tokens, so with top_k=1 all ranks must bring equally many.
    DeepSpeed keeps the groups it makes until `deepspeed.comm.destroy_process_group`. The layer is not for
    `deepspeed.initialize`, which sets the groups of every layer and may do so only once.

    Sets DS_ACCELERATOR=cpu in the environment where there is no CUDA device and it is unset.

    Args:
        sizes: The layer's sizes; num_experts is a multiple of ep_size.
        ep_size: How many neighbouring ranks share the experts.
        seed: Of the weights: `draw_weights`. (DeepSpeed alone would start all experts as copies of one.)

    Returns:
        A layer that holds num_experts / ep_size experts.

    Raises:
        ValueError: If ep_size does not divide the experts, or the ranks that are there.
    """
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if ep_size < 1 or sizes.num_experts % ep_size or ranks % ep_size:
        raise ValueError(
            f"ep_size: got {ep_size}, accepts common divisors of num_experts={sizes.num_experts} and the number of "
            f"ranks, which is {ranks}: for more, start them and call torch.distributed.init_process_group first"
        )
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.moe.layer import MoE

    moe = MoE(
        sizes.d_model,
        _Expert(sizes),
        num_experts=sizes.num_experts,
        ep_size=ep_size,
        k=sizes.top_k,
        min_capacity=0,  # top1gating refuses fewer tokens than that
        drop_tokens=False,
        use_rts=False,
        top2_2nd_expert_sampling=False,
    )
    rank = _connect(moe) if ep_size > 1 else 0
    layer = _DeepSpeed(moe, sizes, first_expert=rank * moe.num_local_experts)
    copy_weights(layer, **draw_weights(sizes, seed=seed))
    return layer


def _connect(moe: Any) -> int:
    """Give DeepSpeed the process group that torch has, make the layer's own groups and return the rank in its own."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles C++, for inference alone
    with contextlib.redirect_stdout(sys.stderr):  # it prints
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
        moe.set_deepspeed_parallelism()
    return dist.get_rank(moe.deepspeed_moe.ep_group)


class _HuggingFace(PeerLayer):
    def forward(self, x_TM: Tensor) -> Tensor:
        return self.inner(x_TM[None])[0]

    def parts(self) -> dict[str, Sequence[nn.Parameter]]:
        block: Any = self.inner
        up, down = block.experts.gate_up_proj, block.experts.down_proj
        return {"router_EM": [block.gate.weight], "up_EHM": [up], "down_EMH": [down]}


class _DeepSpeed(PeerLayer):
    def forward(self, x_TM: Tensor) -> Tensor:
        y_TM, _, _ = self.inner(x_TM)
        return y_TM

    def parts(self) -> dict[str, Sequence[nn.Parameter]]:
        moe: Any = self.inner
        experts = moe.deepspeed_moe.experts.deepspeed_experts
        return {
            "router_EM": [moe.deepspeed_moe.gate.wg.weight],
            "up_EHM": [expert.up.weight for expert in experts],
            "down_EMH": [expert.down.weight for expert in experts],
        }


class _Expert(nn.Module):
    """What DeepSpeed is given: it has no experts of its own."""

    def __init__(self, sizes: MoESizes) -> None:
        super().__init__()
        self.gated = sizes.gated
        self.up = nn.Linear(sizes.d_model, sizes.shapes()["up_EHM"][1], bias=False)
        self.activation = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}[sizes.activation]()
        self.down = nn.Linear(sizes.d_hidden, sizes.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.gated:
            return self.down(self.activation(self.up(x)))
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(self.activation(gate) * up)
