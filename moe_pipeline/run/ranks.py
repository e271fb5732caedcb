"""The ranks that share experts, which parameters are spread over them, and sums and stacks over all experts.

Legend: E experts over all ranks, L experts of one rank.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

EXPERT_AXIS, REPLICA_AXIS = "expert", "replica"
_SPREAD = "_moe_pipeline_spread"  # where a parameter keeps its `Spread`


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertRanks:
    """Who holds which experts.

    Source: MPipeMoE (arXiv:2506.22175) section IV-B: experts are spread over ranks, the rest is replicated.
    """

    experts: dist.ProcessGroup
    """Ranks over which one copy of all experts is spread, in order."""
    replicas: dist.ProcessGroup
    """Ranks that hold the same experts as this one; their gradients are averaged."""

    def __deepcopy__(self, memo: object) -> "ExpertRanks":
        return self  # groups are of the job, not of a model

    @property
    def size(self) -> int:
        """Ranks that share one copy of the experts; not in the paper."""
        return self.experts.size()

    @property
    def rank(self) -> int:
        """This rank among them; not in the paper."""
        return self.experts.rank()

    def local_experts(self, num_experts: int) -> int:
        """Experts per rank.

        Args:
            num_experts: E.

        Raises:
            ValueError: If the ranks cannot share them equally.

        Source: MPipeMoE (arXiv:2506.22175) section IV-B.
        """
        if num_experts % self.size:
            raise ValueError(
                f"num_experts: got {num_experts} for {self.size} ranks; accepted is a multiple of {self.size}, so that "
                "each rank holds as many: change num_experts, or the ranks per copy in expert_ranks()"
            )
        return num_experts // self.size


def expert_ranks(mesh: DeviceMesh | None = None, *, ranks_per_copy: int | None = None) -> ExpertRanks:
    """Groups for experts and for their replicas, from a device mesh; every rank of the job calls it together.

    Args:
        mesh: A mesh with an axis named "expert" and, if there are several copies of the experts, one named "replica";
            None makes one over all ranks.
        ranks_per_copy: Without a mesh: ranks over which one copy is spread; None takes all ranks.

    Returns:
        The groups.

    Raises:
        RuntimeError: If torch.distributed has not been started.
        ValueError: If the mesh has no such axes, or the ranks cannot be divided.

    Source: not in the paper.
    """
    if not dist.is_initialized():
        raise RuntimeError(
            "expert_ranks: torch.distributed has not been started; call init_process_group first (or start with "
            "torchrun), or build the layer without ranks to keep all experts in this process"
        )
    if mesh is None:
        world = dist.get_world_size()
        size = world if ranks_per_copy is None else ranks_per_copy
        if size < 1 or world % size:
            raise ValueError(f"ranks_per_copy: got {size} for {world} ranks; accepted is a divisor of {world}")
        device_type = "cuda" if "nccl" in str(dist.get_backend()) else "cpu"
        mesh = init_device_mesh(device_type, (world // size, size), mesh_dim_names=(REPLICA_AXIS, EXPERT_AXIS))
    elif ranks_per_copy is not None:
        raise ValueError(f"ranks_per_copy: got {ranks_per_copy} together with a mesh; accepted is one of the two")
    names = mesh.mesh_dim_names or ()
    if EXPERT_AXIS not in names or REPLICA_AXIS not in names:
        raise ValueError(
            f"mesh: got axes {names}; accepted is a mesh with axes named {REPLICA_AXIS!r} and {EXPERT_AXIS!r} (of size "
            "1 where there is one copy): init_device_mesh(device, (copies, ranks), "
            f"mesh_dim_names=({REPLICA_AXIS!r}, {EXPERT_AXIS!r}))"
        )
    return ExpertRanks(experts=mesh.get_group(EXPERT_AXIS), replicas=mesh.get_group(REPLICA_AXIS))


@dataclass(eq=False)
class Spread:
    """What a parameter of experts that are spread over ranks knows of them.

    Source: not in the paper.
    """

    ranks: ExpertRanks
    averages: bool = True
    """Whether its gradient is averaged over ranks; DeepSpeed does that itself."""


def spread_of(parameter: Tensor) -> Spread | None:
    """Who shares the experts that a parameter belongs to.

    Args:
        parameter: Any parameter.

    Returns:
        What it knows of them; None for one that is equal on every rank.

    Source: not in the paper.
    """
    return getattr(parameter, _SPREAD, None)


def mark_spread(parameters: Iterable[nn.Parameter], ranks: ExpertRanks) -> bool:
    """Let parameters of experts know who shares them; what they know already stays.

    Args:
        parameters: This rank's experts.
        ranks: Who shares them.

    Returns:
        Whether their gradients are to be averaged over ranks.

    Source: not in the paper.
    """
    averages = True
    for parameter in parameters:
        spread = spread_of(parameter)
        if spread is None:
            setattr(parameter, _SPREAD, Spread(ranks))
        else:
            averages = averages and spread.averages
    return averages


def average_over_ranks(grads: Sequence[Tensor | None], ranks: ExpertRanks) -> list[Tensor | None]:
    """Make experts' gradients the average over all ranks' losses, as DistributedDataParallel makes those of the rest.

    A rank's experts see the tokens of every rank, so their gradient is already a sum over those ranks: it is divided
    by their number and averaged over the replicas.

    Args:
        grads: Gradients of this rank's experts, None for those without; they are overwritten.
        ranks: Who shares them.

    Returns:
        The same tensors.

    Source: not in the paper.
    """
    for grad in grads:
        if grad is not None:
            grad.div_(ranks.size * ranks.replicas.size())
            if ranks.replicas.size() > 1:
                dist.all_reduce(grad, group=ranks.replicas)
    return list(grads)


def sum_over_experts(value: Tensor, ranks: ExpertRanks) -> Tensor:
    """The sum of a tensor over the ranks that share experts.

    Args:
        value: Any tensor of equal shape on every rank.
        ranks: Who takes part.

    Returns:
        A new tensor.

    Source: not in the paper.
    """
    total = value.clone()
    dist.all_reduce(total, group=ranks.experts)
    return total


def gather_experts(value_L: Tensor, ranks: ExpertRanks) -> Tensor:
    """Stack a tensor whose first dimension is this rank's experts over all ranks that share them.

    Args:
        value_L: (L, ...), of equal shape on every rank.
        ranks: Who takes part.

    Returns:
        (E, ...) in the experts' order.

    Source: not in the paper.
    """
    whole = value_L.new_empty(ranks.size * len(value_L), *value_L.shape[1:])
    dist.all_gather_into_tensor(whole, value_L.contiguous(), group=ranks.experts)
    return whole
