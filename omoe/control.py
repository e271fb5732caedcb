"""Controls: what else could explain a difference that an orthogonal step makes.

    length   the step keeps its direction and takes the length that the orthogonal step would have: a smaller step
    random   as much is taken out, along directions that say nothing of the other experts
    own      what is taken out is the expert's own subspace, not the others'

Shapes: E experts, O output features, I input features, K = O * I.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from omoe.subspace import dot_products


def shortened(step_EOI: Tensor, removed_EOI: Tensor) -> Tensor:
    """What has to be taken off every expert's step so that it is only shortened, to the length of step - removed.

    Source: our definition, section 13: a control must match the step's length.
    """
    length_E = torch.linalg.vector_norm(step_EOI, dim=(1, 2))
    kept_E = torch.linalg.vector_norm(step_EOI - removed_EOI, dim=(1, 2))
    share_E = torch.where(length_E > 0, 1 - kept_E / length_E, 0)
    return step_EOI * share_E[:, None, None]


def random_like(change_EK: Tensor, *, seed: int) -> Tensor:
    """Directions that span as many dimensions as the changes do, drawn at random; zero where a change is.

    Source: our definition, section 10: a random projector of equal trace.
    """
    generator = torch.Generator(change_EK.device).manual_seed(seed)
    drawn_EK = torch.randn(change_EK.shape, generator=generator, dtype=change_EK.dtype, device=change_EK.device)
    return drawn_EK * (change_EK != 0).any(1, keepdim=True)


def rotation(d_in: int, *, seed: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Another basis: an order of the inputs and their signs, drawn at random. Projectors keep their spectrum in it.

    Returns:
        (I,) int64 and (I,) of 1 and -1 in the dtype of `like`.

    Source: our definition, section 10: a random projector of equal trace.
    """
    generator = torch.Generator(like.device).manual_seed(seed)
    order_I = torch.randperm(d_in, generator=generator, device=like.device)
    sign_I = torch.randint(2, (d_in,), generator=generator, device=like.device).to(like.dtype) * 2 - 1
    return order_I, sign_I


def along_own(step_EK: Tensor, change_EK: Tensor) -> Tensor:
    """The part of every expert's step that lies along its own change.

    Source: our definition, section 10: own-projector control.
    """
    square_E = dot_products(change_EK, change_EK).diagonal()
    overlap_E = dot_products(step_EK, change_EK).diagonal()
    share_E = torch.where(square_E > 0, overlap_E / square_E, 0).to(change_EK.dtype)
    return change_EK * share_E[:, None]


def seed_of(step: int, names: Sequence[str], name: str) -> int:
    """A seed for every step and linear, the same on every rank.

    Source: not in the paper.
    """
    return step * len(names) + list(names).index(name)
