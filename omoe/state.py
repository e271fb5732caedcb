"""What OMoE remembers of every expert linear, made new or taken from a checkpoint.

    start_...         the weights before the first step, once if all experts were copies (space=update); see start.py
    projector_EII     the projectors, float32 (space=input, exact)
    columns_EIW       what makes up the projectors, float32 (space=input with a rank); see low_rank.py
    filled            how many columns are in use, int64
    dropped_E         squared length that was dropped from them, float64
    num_tokens_E      tokens seen so far, int64 (space=input; zero where weights or gradients are the source)
    removed_energy_E  share of the latest orthogonal step that was taken out, float32
    leftover_E        share of the latest measured step that lay in the others' subspace, float32

Shapes: E experts, O output features, I input features; for side=output, projectors and columns have O for I.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from omoe.config import OMoEConfig
from omoe.experts import ExpertLinear, equal_experts, expert_weights
from omoe.low_rank import num_columns
from omoe.start import kept_start

LinearState = dict[str, Tensor]


def initial_state(linear: ExpertLinear, config: OMoEConfig) -> LinearState:
    """The state before the first step, beside the parameters.

    Source: our definition, section 4, init of the pseudo-code; W_0 of the update space, section 13.
    """
    num_experts, d_out, d_in = linear.shape_EOI
    width = d_in if config.side == "input" else d_out
    device = linear.parameters[0].device
    state = {name: torch.zeros(num_experts, device=device) for name in ("removed_energy_E", "leftover_E")}
    if config.space == "update":
        weights = expert_weights(linear)
        return {**state, **kept_start(weights[0][None] if equal_experts(linear) else torch.stack(weights))}
    state["num_tokens_E"] = torch.zeros(num_experts, dtype=torch.int64, device=device)
    if config.rank is None:
        return {**state, "projector_EII": torch.eye(width, device=device).repeat(num_experts, 1, 1)}
    return {
        **state,
        "columns_EIW": torch.zeros(num_experts, width, num_columns(config.rank), device=device),
        "filled": torch.zeros((), dtype=torch.int64),
        "dropped_E": torch.zeros(num_experts, dtype=torch.float64, device=device),
    }


def loaded_state(
    loaded: object, expert_linears: Sequence[ExpertLinear], config: OMoEConfig
) -> tuple[int, dict[str, LinearState]]:
    """Check what `OMoE.state_dict` kept and copy it beside the parameters.

    Args:
        loaded: {"num_steps": int, "linears": {name: state}}; no linears before the first step.
        expert_linears: Those that are projected.
        config: Says what each of them must have.

    Returns:
        Number of steps, and the state of every expert linear by name.

    Raises:
        ValueError: Anything is missing, unknown, or of another type, shape or dtype.

    Source: not in the paper.
    """
    if not isinstance(loaded, dict) or loaded.keys() != {"num_steps", "linears"}:
        raise ValueError(
            "state_dict['omoe']: expected num_steps and linears, as OMoE.state_dict() gives them; "
            "to start from the base optimizer's state alone, load that into the base"
        )
    num_steps, linears = loaded["num_steps"], loaded["linears"]
    if not isinstance(num_steps, int) or isinstance(num_steps, bool) or num_steps < 0:
        raise ValueError(f"state_dict['omoe']['num_steps']: got {num_steps!r}; expected an integer of at least 0")
    names = {linear.name for linear in expert_linears} if num_steps else set()
    if not isinstance(linears, dict) or linears.keys() != names:
        came = sorted(map(str, linears)) if isinstance(linears, dict) else type(linears).__name__
        raise ValueError(
            f"state_dict['omoe']['linears']: got {came}; expected {sorted(names)} after {num_steps} steps. "
            "Use the checkpoint with the model and the config.linears that wrote it"
        )
    copies = {linear.name: _copied(linear, linears[linear.name], config) for linear in expert_linears if num_steps}
    return num_steps, copies


def _copied(linear: ExpertLinear, tensors: object, config: OMoEConfig) -> LinearState:
    wanted = initial_state(linear, config)
    if not isinstance(tensors, dict) or tensors.keys() != wanted.keys():
        came = sorted(map(str, tensors)) if isinstance(tensors, dict) else type(tensors).__name__
        raise ValueError(
            f"state_dict['omoe']: {linear.name!r} has {came}; expected {sorted(wanted)} for space={config.space!r}"
        )
    for name, like in wanted.items():
        tensor = tensors[name]
        if name.startswith("start_") and isinstance(tensor, Tensor) and tensor.ndim == 3:  # copies then, not now
            like = like[:1] if len(tensor) == 1 else like.expand(linear.num_experts, -1, -1)
        if not isinstance(tensor, Tensor) or tensor.shape != like.shape or tensor.dtype != like.dtype:
            came = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(
                f"state_dict['omoe']: {name} of {linear.name!r} is {came}; expected {like.dtype} {tuple(like.shape)}"
            )
    return {name: tensors[name].to(like.device, copy=True) for name, like in wanted.items()}
