"""Experts spread over ranks under DeepSpeed: what ZeRO must be told so that it averages them over their replicas alone.

DeepSpeed knows expert parameters by two attributes and by a group of the optimizer, and makes the process groups for
them when the model holds an instance of its own layer. It sums an expert's gradient over the replicas and divides by
all ranks, which is what our layers do without it.
"""

from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.utils import groups as deepspeed_groups
from torch import nn

from moe_pipeline.parallel import leave_gradients, spread_parameters
from moe_pipeline.run.ranks import ExpertRanks, spread_of


class Marker(MoE):
    """A layer without parameters that makes DeepSpeed set up its groups for experts; nobody calls it.

    Args:
        ranks: Who shares the experts.

    Raises:
        ValueError: When the engine is made, if DeepSpeed would replicate experts over other ranks.
    """

    num_local_experts = 0  # there is nothing here that DeepSpeed's checkpoints could split into files of experts

    def __init__(self, ranks: ExpertRanks) -> None:
        nn.Module.__init__(self)
        self.ranks = ranks
        self.ep_size = self.num_experts = ranks.size
        self.expert_group_name = _group_name(ranks)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Make the groups, once for all layers, and compare them with ours."""
        if self.expert_group_name not in deepspeed_groups._get_expert_parallel_group_dict():
            deepspeed_groups._create_expert_and_data_parallel(
                self.ep_size, use_data_before_expert_parallel_=use_data_before_expert_parallel_
            )
        theirs = dist.get_process_group_ranks(deepspeed_groups._get_expert_data_parallel_group(self.expert_group_name))
        ours = dist.get_process_group_ranks(self.ranks.replicas)
        if list(theirs) != list(ours):
            raise ValueError(
                f"ranks: got experts replicated on ranks {list(ours)}, accepts {list(theirs)}, where DeepSpeed puts "
                f"replicas; make the groups with expert_ranks(ranks_per_copy={self.ep_size})"
            )


def mark_experts(model: nn.Module) -> list[str]:
    """Prepare a model with spread experts for `deepspeed.initialize`; its optimizer needs `split_groups`.

    Args:
        model: The very module that DeepSpeed is given, before it is; its layers stop averaging expert gradients.

    Returns:
        The names of the parameters of spread experts; empty, and nothing was done, where there are none.
    """
    names = leave_gradients(model)
    markers: dict[str, Marker] = {}
    parameter: Any  # that takes DeepSpeed's attributes
    for parameter in spread_parameters(model).values():
        spread = spread_of(parameter)
        assert spread is not None, "spread parameters know who shares them"
        parameter.allreduce, parameter.group_name = False, _group_name(spread.ranks)
        markers.setdefault(_group_name(spread.ranks), Marker(spread.ranks))
    for name, marker in markers.items():
        model.add_module(f"deepspeed_{name}", marker)
    return names


def split_groups(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """An optimizer's groups with marked experts in groups of their own, which ZeRO 1 and 2 shard over replicas.

    Args:
        groups: The groups, as an optimizer takes them.

    Returns:
        The same groups without experts, and after them those of experts; none is empty.
    """
    named = [{**group, "name": f"group {index}"} for index, group in enumerate(groups)]
    split = split_params_into_different_moe_groups_for_optimizer(named)
    return [group for group in split if group["params"]]


def skip_compilation() -> None:
    """Keep DeepSpeed from compiling a C++ extension, for inference alone, when it starts: it takes a minute."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _group_name(ranks: ExpertRanks) -> str:
    return f"ep_size_{ranks.size}"
