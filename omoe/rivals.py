"""Losses by which others keep experts apart, to be added to a task's loss; OMoE needs none of them.

Shapes: E experts, T tokens, M model width, O output features, I input features.
"""

import torch
from torch import Tensor
from torch.nn import functional


def output_orthogonality(output_ETM: Tensor) -> Tensor:
    """Squared cosine of every two experts' outputs for the same token, averaged.

    Args:
        output_ETM: Outputs for tokens that are sent to every expert; the source takes the chosen experts of a token.

    Returns:
        A differentiable scalar in [0, 1], 1 for copies.

    Source: Advancing Expert Specialization (arXiv:2505.22323), its orthogonality loss: the part of an output that lies
        along another expert's, here relative to its length.
    """
    unit_TEM = functional.normalize(output_ETM.transpose(0, 1), dim=2)
    return _off_diagonal(unit_TEM @ unit_TEM.mT).square().mean()


def weight_orthogonality(weight_EOI: Tensor) -> Tensor:
    """Squared cosine of every two experts' weights, averaged.

    Args:
        weight_EOI: One linear of all experts.

    Returns:
        A differentiable scalar in [0, 1], 1 for copies.

    Source: Geometric Regularization in MoE (arXiv:2601.00457), orthogonality loss on weights.
    """
    unit_EN = functional.normalize(weight_EOI.flatten(1), dim=1)
    return _off_diagonal(unit_EN @ unit_EN.T).square().mean()


def router_similarity(router_EM: Tensor) -> Tensor:
    """How far the Gram matrix of a router's rows is from the identity, as a sum of absolute values.

    Args:
        router_EM: The router's weight, one row per expert.

    Returns:
        A differentiable scalar.

    Source: SimBal (arXiv:2506.14038).
    """
    gram_EE = router_EM @ router_EM.T
    return (gram_EE - torch.eye(len(gram_EE), dtype=gram_EE.dtype, device=gram_EE.device)).abs().sum()


def _off_diagonal(square: Tensor) -> Tensor:
    num_experts = square.shape[-1]
    if num_experts < 2:
        raise ValueError(f"got {num_experts} expert: keeping experts apart needs at least 2")
    others = ~torch.eye(num_experts, dtype=torch.bool, device=square.device)
    return square[..., others]
