"""The meaning of the gate and the layer, in loops over tokens and experts.

Legend: T tokens, M model width, E experts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_pipeline.config import GateConfig


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One token that one expert computes.

    Source: our definition.
    """

    token: int
    """Index of the token."""
    expert: int
    """Index of the expert."""
    weight: Tensor
    """Scalar the result is multiplied by, differentiable."""


def chosen_entries(logits_TE: Tensor, config: GateConfig) -> list[Entry]:
    """Every choice, before draws and capacity: all first choices in token order, then all second choices, and so on.

    Args:
        logits_TE: Router logits, noise included.
        config: The rule.

    Returns:
        The choices.

    Source: as `moe_pipeline.gate.Gate`.
    """
    num_tokens, num_experts = logits_TE.shape
    probs_TE = logits_TE.softmax(-1)
    entries = []
    if config.kind == "expert_choice":
        capacity = config.capacity_rows(num_tokens) or 0
        for expert in range(num_experts):
            best_first = sorted(range(num_tokens), key=lambda token: -probs_TE[token, expert].item())
            entries += [Entry(token=t, expert=expert, weight=probs_TE[t, expert]) for t in best_first[:capacity]]
        return entries
    for choice in range(config.top_k):
        for token in range(num_tokens):
            best_first = sorted(range(num_experts), key=lambda expert: -probs_TE[token, expert].item())
            weight = probs_TE[token, best_first[choice]]
            if config.normalize and config.kind != "switch":
                weight = weight / probs_TE[token, best_first[: config.top_k]].sum()
            entries.append(Entry(token=token, expert=best_first[choice], weight=weight))
    return entries


def kept_entries(logits_TE: Tensor, config: GateConfig, *, draws: Sequence[float] | None = None) -> list[Entry]:
    """The choices that survive GShard's draws and the capacity limit.

    Args:
        logits_TE: Router logits, noise included.
        config: The rule.
        draws: One number in [0, 1) per token; a second expert is kept where it is below twice its weight.

    Returns:
        The entries that are computed.

    Source: as `moe_pipeline.gate.Gate`.
    """
    capacity = config.capacity_rows(len(logits_TE))
    rows = [0] * config.num_experts
    kept = []
    for place, entry in enumerate(chosen_entries(logits_TE, config)):
        is_second = config.kind == "gshard" and place >= len(logits_TE)
        if is_second and draws is not None and draws[entry.token] >= 2 * entry.weight.item():
            continue
        if capacity is not None and config.kind != "expert_choice" and rows[entry.expert] >= capacity:
            continue
        rows[entry.expert] += 1
        kept.append(entry)
    return kept


def router_losses(logits_TE: Tensor, config: GateConfig) -> dict[str, Tensor]:
    """The balance, z and importance losses, without learned noise.

    Args:
        logits_TE: Router logits, noise included.
        config: The rule.

    Returns:
        Name -> differentiable scalar.

    Source: as the functions of `moe_pipeline.losses`.
    """
    num_tokens, num_experts = logits_TE.shape
    zero = logits_TE.sum() * 0
    if num_tokens == 0:
        return {"balance": zero, "z": zero, "importance": zero}
    entries = chosen_entries(logits_TE, config)
    counted = entries[:num_tokens] if config.kind == "gshard" else entries
    balance, importances = zero, []
    for expert in range(num_experts):
        fraction = sum(entry.expert == expert for entry in counted) / len(counted)
        balance = balance + num_experts * fraction * logits_TE.softmax(-1)[:, expert].mean()
        importances.append(sum((entry.weight for entry in entries if entry.expert == expert), start=zero))
    mean = sum(importances, start=zero) / num_experts
    variance = sum(((amount - mean) ** 2 for amount in importances), start=zero) / num_experts
    z = sum((row.exp().sum().log() ** 2 for row in logits_TE), start=zero) / num_tokens
    return {"balance": balance, "z": z, "importance": variance / mean**2}


def moe_layer(
    x_TM: Tensor,
    logits_TE: Tensor,
    config: GateConfig,
    experts: Sequence[Callable[[Tensor], Tensor]],
    *,
    draws: Sequence[float] | None = None,
) -> Tensor:
    """The layer's output, one token and one expert at a time.

    Args:
        x_TM: Tokens.
        logits_TE: Router logits, noise included.
        config: The rule.
        experts: One function of a token of shape (M,) per expert.
        draws: As for `kept_entries`.

    Returns:
        y_TM.

    Source: MPipeMoE (arXiv:2506.22175) section II-A.
    """
    rows = [torch.zeros_like(token_M) for token_M in x_TM]
    for entry in kept_entries(logits_TE, config, draws=draws):
        rows[entry.token] = rows[entry.token] + entry.weight * experts[entry.expert](x_TM[entry.token])
    return torch.stack(rows) if rows else torch.zeros_like(x_TM)
