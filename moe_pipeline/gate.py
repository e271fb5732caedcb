"""The gate: scores every token and returns one entry per (token, expert) pair that will be computed.

Capacity limits, padding and experts that choose their tokens all end in the same flat list of entries, so nothing
after the gate knows which kind of gate it was.

Legend: T tokens, M model width, E experts, K choices per token, N chosen pairs, A pairs kept, C rows per expert.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_pipeline.config import GateConfig
from moe_pipeline.losses import (
    RouterLosses,
    balance_loss,
    importance_loss,
    smooth_load,
    squared_variation,
    z_loss,
)

ROUTER_STD = 0.02  # small, so that a new router is almost uniform yet tells tokens apart
_NOISE_FLOOR = 1e-2  # logits; learned noise never vanishes, as in Shazeer et al.'s code


@dataclass(frozen=True, kw_only=True, eq=False)
class Assignment:
    """Which expert computes which token, and with what weight.

    Source: our definition (a flat list of what the papers draw as one-hot tensors).
    """

    token_A: Tensor
    """int64, index of the token."""
    expert_A: Tensor
    """int64, index of the expert."""
    weight_A: Tensor
    """Combine weight, at least float32, differentiable."""
    num_chosen: int
    """Pairs chosen before the capacity limit; A of them were kept."""
    losses: RouterLosses
    """The router's losses over the routed tokens."""


class Gate(nn.Module):
    """A linear router in float32 and the rule that turns its scores into an assignment.

    Args:
        config: The rule, its noise and its capacity.
        d_model: Width M of the tokens.

    Source: MPipeMoE (arXiv:2506.22175) section IV-A (top-k); Shazeer et al. (arXiv:1701.06538) equations 3-5 (learned
    noise); GShard (arXiv:2006.16668) algorithm 1; Switch (arXiv:2101.03961) sections 2.1-2.4 (jitter, float32 router);
    Expert Choice (arXiv:2202.09368) section 3.
    """

    def __init__(self, config: GateConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.router = nn.Linear(d_model, config.num_experts, bias=False)
        nn.init.normal_(self.router.weight, std=ROUTER_STD)
        if config.noise == "learned":
            self.noise = nn.Linear(d_model, config.num_experts, bias=False)
            nn.init.zeros_(self.noise.weight)

    def forward(self, x_TM: Tensor, *, mask_T: Tensor | None = None) -> Assignment:
        """Assign tokens to experts.

        Args:
            x_TM: Tokens, any floating dtype.
            mask_T: bool, False for padding, which is not routed and counts in no loss.

        Returns:
            The assignment; its token indices point into all T tokens, masked or not.

        Source: see the class.
        """
        if mask_T is None:
            return self._assign(x_TM)
        routed_T = mask_T.nonzero().squeeze(1)
        assignment = self._assign(x_TM.index_select(0, routed_T))
        return replace(assignment, token_A=routed_T[assignment.token_A])

    def _assign(self, x_TM: Tensor) -> Assignment:
        config, noise = self.config, self.config.noise if self.training else "none"
        with torch.autocast(x_TM.device.type, enabled=False):
            x_TM = x_TM.to(torch.promote_types(x_TM.dtype, torch.float32))
            if noise == "jitter":
                x_TM = x_TM * torch.empty_like(x_TM).uniform_(1 - config.noise_std, 1 + config.noise_std)
            clean_TE = logits_TE = functional.linear(x_TM, self.router.weight.to(x_TM.dtype))
            load_E = draw_T = None
            if noise == "gaussian":
                logits_TE = clean_TE + config.noise_std * torch.randn_like(clean_TE)
            if noise == "learned":
                std_TE = functional.softplus(functional.linear(x_TM, self.noise.weight.to(x_TM.dtype))) + _NOISE_FLOOR
                logits_TE = clean_TE + std_TE * torch.randn_like(clean_TE)
                load_E = smooth_load(clean_TE, logits_TE, std_TE, top_k=config.top_k)
            if config.kind == "gshard" and self.training:
                draw_T = torch.rand(len(x_TM), device=x_TM.device)
            return assign(logits_TE, config=config, load_E=load_E, draw_T=draw_T)


def assign(
    logits_TE: Tensor, *, config: GateConfig, load_E: Tensor | None = None, draw_T: Tensor | None = None
) -> Assignment:
    """Turn logits into an assignment; everything random is an argument.

    Args:
        logits_TE: Router logits, noise included, at least float32.
        config: The rule.
        load_E: Smooth loads, which join the importance loss; None without learned noise.
        draw_T: Uniform draws in [0, 1) that decide about GShard's second experts; None keeps every second expert.

    Returns:
        The assignment. Under a capacity limit all first choices, in token order, go before any second choice.

    Source: as `Gate`.
    """
    probs_TE = logits_TE.softmax(-1)
    choose = _experts_choose if config.kind == "expert_choice" else _tokens_choose
    token_N, expert_N, weight_N = choose(probs_TE, config)
    counted = expert_N[: len(probs_TE)] if config.kind == "gshard" else expert_N  # GShard counts first choices
    importance = importance_loss(weight_N, expert_N, num_experts=config.num_experts)
    losses = RouterLosses(
        balance=balance_loss(probs_TE, counted),
        z=z_loss(logits_TE),
        importance=importance if load_E is None else importance + squared_variation(load_E),
    )
    if draw_T is not None:
        second = weight_N[len(draw_T) :]
        keep_N = torch.cat([torch.ones_like(draw_T, dtype=torch.bool), draw_T < 2 * second])
        token_N, expert_N, weight_N = token_N[keep_N], expert_N[keep_N], weight_N[keep_N]
    num_chosen = len(token_N)
    capacity = config.capacity_rows(len(probs_TE))
    if capacity is not None and config.kind != "expert_choice":
        keep_N = _place_in_expert(expert_N, config.num_experts) < capacity
        token_N, expert_N, weight_N = token_N[keep_N], expert_N[keep_N], weight_N[keep_N]
    return Assignment(token_A=token_N, expert_A=expert_N, weight_A=weight_N, num_chosen=num_chosen, losses=losses)


def _tokens_choose(probs_TE: Tensor, config: GateConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Each token takes its K best experts; entries are all first choices, then all second choices, and so on."""
    weight_TK, expert_TK = probs_TE.topk(config.top_k, dim=-1)
    if config.normalize and config.kind != "switch":
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
    token_N = torch.arange(len(probs_TE), device=probs_TE.device).repeat(config.top_k)
    return token_N, expert_TK.t().flatten(), weight_TK.t().flatten()


def _experts_choose(probs_TE: Tensor, config: GateConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Each expert takes its C best tokens, wherever they stand: in a causal model the choice sees the future."""
    num_tokens, num_experts = probs_TE.shape
    capacity = config.capacity_rows(num_tokens)
    assert capacity is not None, "GateConfig gives expert_choice a capacity"
    weight_CE, token_CE = probs_TE.topk(min(capacity, num_tokens), dim=0)
    expert_N = torch.arange(num_experts, device=probs_TE.device).repeat_interleave(len(token_CE))
    return token_CE.t().flatten(), expert_N, weight_CE.t().flatten()


def _place_in_expert(expert_N: Tensor, num_experts: int) -> Tensor:
    """How many earlier entries have the same expert."""
    order_N = expert_N.argsort(stable=True)
    counts_E = torch.bincount(expert_N, minlength=num_experts)
    first_E = counts_E.cumsum(0) - counts_E
    place_N = torch.empty_like(expert_N)
    place_N[order_N] = torch.arange(len(expert_N), device=expert_N.device) - first_E[expert_N[order_N]]
    return place_N
