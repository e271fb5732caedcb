"""The router's losses: pure functions of its scores, and the record that carries them.

Legend: T tokens, E experts, N chosen (token, expert) pairs before any capacity limit.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_pipeline.config import GateConfig


@dataclass(frozen=True, kw_only=True, eq=False)
class RouterLosses:
    """Differentiable scalars, not yet weighted.

    Source: each function of this module names the paper of its loss.
    """

    balance: Tensor
    """1 where load and probability are even, up to E where one expert takes all."""
    z: Tensor
    """Mean squared log-partition of the logits."""
    importance: Tensor
    """Squared variation of the experts' summed weights, plus that of their smooth loads under learned noise."""

    def total(self, config: GateConfig) -> Tensor:
        """The weighted sum to add to the task's loss.

        Args:
            config: Names the three weights.

        Returns:
            One differentiable scalar.

        Source: our definition; each paper adds its own loss to the task's.
        """
        return (
            config.balance_weight * self.balance + config.z_weight * self.z + config.importance_weight * self.importance
        )


def balance_loss(probs_TE: Tensor, expert_N: Tensor) -> Tensor:
    """E times the sum over experts of (fraction of choices) times (mean probability).

    Args:
        probs_TE: Router probabilities, floating point.
        expert_N: The experts chosen, int64, before any capacity limit.

    Returns:
        A scalar; the gradient flows through the probabilities. 0 without tokens.

    Source: Switch (arXiv:2101.03961) equations 4-6; GShard (arXiv:2006.16668) algorithm 1 with first choices only.
    """
    num_tokens, num_experts = probs_TE.shape
    fraction_E = torch.bincount(expert_N, minlength=num_experts) / max(len(expert_N), 1)
    probability_E = probs_TE.sum(0) / max(num_tokens, 1)
    return num_experts * (fraction_E * probability_E).sum()


def z_loss(logits_TE: Tensor) -> Tensor:
    """Mean over tokens of the squared logarithm of the softmax's denominator.

    Args:
        logits_TE: Router logits, floating point.

    Returns:
        A scalar; 0 without tokens.

    Source: ST-MoE (arXiv:2202.08906) equation 5.
    """
    return logits_TE.logsumexp(-1).square().sum() / max(len(logits_TE), 1)


def importance_loss(weight_N: Tensor, expert_N: Tensor, *, num_experts: int) -> Tensor:
    """Squared coefficient of variation of the weight each expert receives.

    Args:
        weight_N: Combine weights, floating point, before any capacity limit.
        expert_N: The expert of each weight, int64.
        num_experts: Number of experts.

    Returns:
        A scalar; 0 without tokens.

    Source: Shazeer et al. (arXiv:1701.06538) equations 6-7.
    """
    return squared_variation(weight_N.new_zeros(num_experts).index_add(0, expert_N, weight_N))


def smooth_load(clean_TE: Tensor, noisy_TE: Tensor, noise_std_TE: Tensor, *, top_k: int) -> Tensor:
    """Expected number of tokens per expert if each token drew its noise for that expert again.

    Args:
        clean_TE: Logits before noise, floating point.
        noisy_TE: The logits the choice was made from.
        noise_std_TE: Standard deviation of the noise, in logits.
        top_k: Experts per token.

    Returns:
        load_E, differentiable in the logits and in the noise's size.

    Source: Shazeer et al. (arXiv:1701.06538) equations 8-10.
    """
    num_tokens, num_experts = clean_TE.shape
    if top_k == num_experts:
        return clean_TE.new_full((num_experts,), num_tokens)
    best = noisy_TE.topk(top_k + 1, dim=-1).values
    last_in_T1, first_out_T1 = best[:, top_k - 1 : top_k], best[:, top_k:]
    to_beat_TE = torch.where(noisy_TE >= last_in_T1, first_out_T1, last_in_T1)
    return torch.special.ndtr((clean_TE - to_beat_TE) / noise_std_TE).sum(0)


def squared_variation(amount_E: Tensor) -> Tensor:
    """Squared coefficient of variation: variance over squared mean.

    Args:
        amount_E: One non-negative amount per expert.

    Returns:
        A scalar; 0 for equal amounts, all zero included.

    Source: Shazeer et al. (arXiv:1701.06538) equation 7.
    """
    return amount_E.var(correction=0) / amount_E.mean().square().clamp_min(torch.finfo(amount_E.dtype).tiny)
