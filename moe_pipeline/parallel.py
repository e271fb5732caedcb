"""Experts spread over ranks inside what trains the rest of a model: DistributedDataParallel, FSDP, DeepSpeed.

The rest of a model is equal on all ranks and is averaged over them; spread experts differ and average themselves. Here
is how the wrappers are told, what is wrong when they are not, and what needs both parts: clipping, and whole weights.

Legend: E experts over all ranks, L experts here.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from moe_pipeline.experts import ModuleExperts
from moe_pipeline.run.ranks import ExpertRanks, gather_experts, spread_of, sum_over_experts

_MANAGED = "_moe_pipeline_managed"  # where a DistributedDataParallel keeps the ids of the parameters it averages


def spread_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of experts that are spread over ranks, which no wrapper may copy, average or shard.

    Args:
        model: Any model; its MoE layers were built with `ranks`.

    Returns:
        Name, relative to the model -> parameter. Its values are FSDP's `ignored_params`.

    Source: not in the paper.
    """
    named = model.named_parameters(remove_duplicate=False)
    return {name: parameter for name, parameter in named if spread_of(parameter) is not None}


def exclude_experts(model: nn.Module) -> list[str]:
    """Keep DistributedDataParallel, plain or by way of accelerate, from copying and averaging spread experts.

    Args:
        model: The very module that DistributedDataParallel is given, before it is.

    Returns:
        The names of the excluded parameters, relative to the model.

    Source: not in the paper.
    """
    names = list(spread_parameters(model))
    before: Sequence[str] = getattr(model, "_ddp_params_and_buffers_to_ignore", ())
    setattr(model, "_ddp_params_and_buffers_to_ignore", [*dict.fromkeys([*before, *names])])  # noqa: B010 (for mypy)
    return names


def check_replication(experts: nn.Module, *, name: str) -> None:
    """Refuse to run inside a DistributedDataParallel that has copied rank 0's experts over those of other ranks.

    Args:
        experts: This rank's experts.
        name: What the error calls their layer.

    Raises:
        RuntimeError: If `exclude_experts` was forgotten, or called for another module.

    Source: not in the paper.
    """
    active = DistributedDataParallel._get_active_ddp_module()
    if active is None:
        return
    managed: set[int] | None = getattr(active, _MANAGED, None)
    if managed is None:
        managed = {id(parameter) for parameter in active._module_parameters}
        setattr(active, _MANAGED, managed)
    if any(id(parameter) in managed for parameter in experts.parameters()):
        raise RuntimeError(
            f"layer {name!r}: DistributedDataParallel has taken its experts for copies and given every rank those of "
            "rank 0; call moe_pipeline.parallel.exclude_experts(model) with the module that DistributedDataParallel "
            "gets, before it gets it"
        )


def leave_gradients(model: nn.Module) -> list[str]:
    """Stop averaging the gradients of spread experts, for a library that does it itself, as DeepSpeed does.

    A parameter's gradient is then the sum over the losses of the ranks that share the experts.

    Args:
        model: Any model.

    Returns:
        The names of their parameters, relative to the model.

    Source: not in the paper.
    """
    spread = spread_parameters(model)
    for parameter in spread.values():
        mark = spread_of(parameter)
        assert mark is not None
        mark.averages = False
    return list(spread)


@torch.no_grad()
def clip_grad_norm(model: nn.Module, max_norm: float) -> Tensor:
    """Scale all gradients by one factor, so that the norm over the dense parameters and all experts is at most this.

    Every rank calls it together and gets the factor that one process with all experts would.

    Args:
        model: Its gradients are averaged already.
        max_norm: The largest norm; infinity only measures.

    Returns:
        The norm before, a scalar in the gradients' precision, equal on every rank.

    Source: torch.nn.utils.clip_grad_norm_; not in the paper.
    """
    parameters = list(model.parameters())
    device = parameters[0].device
    dense: list[Tensor] = []
    spread: dict[int, tuple[ExpertRanks, list[Tensor]]] = {}
    for parameter in parameters:
        mark = spread_of(parameter)
        grads = dense if mark is None else spread.setdefault(id(mark.ranks.experts), (mark.ranks, []))[1]
        if parameter.grad is not None:
            grads.append(parameter.grad)
    square = _square(dense, device)
    for ranks, grads in spread.values():
        square = square + sum_over_experts(_square(grads, device), ranks)
    norm = square.sqrt().to(parameters[0].dtype)
    sharded = any(hasattr(grad, "full_tensor") for grad in dense)  # FSDP's cannot be scaled together with others
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm, foreach=False if sharded else None)
    return norm


def _square(grads: Sequence[Tensor], device: torch.device) -> Tensor:
    """The sum of squares, in float64."""
    norm = nn.utils.get_total_norm(grads)
    if hasattr(norm, "full_tensor"):
        norm = norm.full_tensor()
    return norm.to(device, torch.float64).square()


def gather_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model with all experts, as one process would have it; every rank calls it together.

    Args:
        model: Any model; experts must be `FeedForwardExperts`, others with the expert as first dimension, or
            `ModuleExperts`.

    Returns:
        What `state_dict` of the same model without `ranks` would return; tensors of experts are new.

    Source: not in the paper.
    """
    modules = _spread_modules(model)
    spread = spread_parameters(model)
    whole: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        prefix = next((prefix for prefix in modules if name.startswith(prefix)), None)
        if prefix is not None:
            local, ranks = modules[prefix]
            values = gather_experts(value.unsqueeze(0), ranks)
            whole |= {_renumber(name, prefix, rank * local): part for rank, part in enumerate(values)}
        elif name in spread:
            whole[name] = gather_experts(value, _ranks_of(spread[name]))
        else:
            whole[name] = value
    return whole


def local_state(model: nn.Module, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This rank's part of the state of a whole model, for `load_state_dict`.

    Args:
        model: The model to load into, with experts spread.
        whole: What `gather_state` returned, or the state of the same model on one process.

    Returns:
        A state with this rank's experts; whatever else is there stays.

    Source: not in the paper.
    """
    modules = _spread_modules(model)
    spread = spread_parameters(model)
    state = {name: value for name, value in whole.items() if not any(name.startswith(prefix) for prefix in modules)}
    for name in model.state_dict():
        prefix = next((prefix for prefix in modules if name.startswith(prefix)), None)
        if prefix is not None:
            local, ranks = modules[prefix]
            original = _renumber(name, prefix, ranks.rank * local)
            if original in whole:
                state[name] = whole[original]
        elif name in spread and name in whole:
            rank, local = _ranks_of(spread[name]).rank, len(spread[name])
            state[name] = whole[name][rank * local : (rank + 1) * local]
    return state


def _spread_modules(model: nn.Module) -> dict[str, tuple[int, ExpertRanks]]:
    """Name prefix of every list of experts that is spread -> how many are here, and who shares them."""
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, ModuleExperts):
            mark = next((mark for parameter in module.parameters() if (mark := spread_of(parameter))), None)
            if mark is not None:
                found[f"{name}.experts." if name else "experts."] = (module.num_experts, mark.ranks)
    return found


def _ranks_of(parameter: Tensor) -> ExpertRanks:
    mark = spread_of(parameter)
    assert mark is not None, "only spread parameters are asked"
    return mark.ranks


def _renumber(name: str, prefix: str, first: int) -> str:
    """The name that an expert's tensor has where all experts are in one process."""
    number, _, rest = name.removeprefix(prefix).partition(".")
    return f"{prefix}{int(number) + first}.{rest}"
