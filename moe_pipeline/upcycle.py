"""Upcycling: replace feed-forward layers of a dense model by MoE layers whose experts start as copies of them.

Feed-forward layers are recognised by the names and shapes of their parts, so any model built like one of Hugging
Face's families below works, and the library itself is never imported.

Legend: E experts, M model width, H hidden width, O outputs and I inputs of a linear map.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from moe_pipeline.config import GateConfig, PipelineConfig
from moe_pipeline.dispatch import local_part
from moe_pipeline.experts import FeedForwardExperts, GroupedLinear
from moe_pipeline.gate import Gate
from moe_pipeline.layer import MoEFeedForward, MoELayer
from moe_pipeline.run.buffers import Workspace
from moe_pipeline.run.ranks import ExpertRanks


@dataclass(frozen=True, kw_only=True)
class _Family:
    """Where a family of models keeps the parts of a feed-forward layer, as paths from the module that owns them."""

    name: str
    up: tuple[str, ...]  # one path, or the gate's and then the linear half's
    down: str
    activation: str
    dropout: str = ""  # an nn.Dropout or a probability, between activation and down; "" if there is none
    slot: str = ""  # what becomes the MoE layer; "" is the owner itself
    idle: tuple[str, ...] = ()  # what stays in the data path and must no longer do anything


_FAMILIES = (
    _Family(
        name="BERT, RoBERTa, ELECTRA",
        up=("intermediate.dense",),
        down="output.dense",
        activation="intermediate.intermediate_act_fn",
        slot="intermediate",
        idle=("output.dense",),
    ),
    _Family(
        name="BART, mBART, Marian, ViT, CLIP, OPT",
        up=("fc1",),
        down="fc2",
        activation="activation_fn",
        dropout="activation_dropout",
        slot="fc1",
        idle=("activation_fn", "fc2"),
    ),
    _Family(
        name="DistilBERT",
        up=("lin1",),
        down="lin2",
        activation="activation",
        slot="lin1",
        idle=("activation", "lin2"),
    ),
    _Family(name="T5", up=("wi",), down="wo", activation="act", dropout="dropout"),
    _Family(name="gated T5", up=("wi_0", "wi_1"), down="wo", activation="act", dropout="dropout"),
    _Family(name="Llama", up=("gate_proj", "up_proj"), down="down_proj", activation="act_fn"),
)


def upcycle(
    model: nn.Module,
    config: GateConfig,
    *,
    layers: Sequence[str] | None = None,
    expert_noise_std: float = 0.0,
    seed: int = 0,
    exact: bool = True,
    pipeline: PipelineConfig | None = None,
    ranks: ExpertRanks | None = None,
) -> list[str]:
    """Replace feed-forward layers of a model, in place, by MoE layers whose experts are copies of them.

    Weights load into a model that was upcycled in the same way: build it dense, upcycle it, `load_state_dict`.

    Args:
        model: A dense model of one of the families this module lists.
        config: The gate of every new layer.
        layers: Patterns (as in `fnmatch`) on the names of the modules that own a feed-forward layer, such as
            "model.encoder.layers.1" or "*decoder*"; None takes all of them.
        expert_noise_std: Standard deviation of the noise added to each expert's weights, relative to that of the
            weight it was copied from.
        seed: Seed of the routers and of the noise; the global random stream is left where it was.
        exact: Refuse a gate under which even equal experts would change what the model computes.
        pipeline: Chunks of every new layer, and what it keeps for backward.
        ranks: Who shares the experts; each rank keeps its part of those that one process would have. None keeps all.

    Returns:
        The names of the modules whose feed-forward layer was replaced, in the model's order.

    Raises:
        ValueError: If nothing matches, a pattern matches nothing, a layer computes something else than its parts
            suggest, `exact` cannot be kept, or ranks cannot share the experts equally.
        TypeError: If `layers` is one string.

    Source: Sparse Upcycling (arXiv:2212.05055) section 3; this is not in the paper of MPipeMoE.
    """
    if exact:
        _check_exact(config)
    if not 0 <= expert_noise_std < float("inf"):
        raise ValueError(f"expert_noise_std: got {expert_noise_std}; accepted is a finite number of at least 0")
    chosen = _choose(_find(model), layers)
    for name, family in chosen.items():
        _check_function(name, model.get_submodule(name), family)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        workspace = Workspace()
        for name, family in chosen.items():
            owner = model.get_submodule(name)
            experts, gate = _build(owner, family, config, expert_noise_std)
            if ranks is not None:
                local_part(experts, ranks)
            moe = MoELayer(gate, experts, pipeline=pipeline, ranks=ranks, workspace=workspace, name=name or "moe")
            _install(model, name, family, MoEFeedForward(moe).train(owner.training))
    return list(chosen)


def _check_exact(config: GateConfig) -> None:
    """Copies of one expert compute what that expert does if, and only if, every token's weights sum to 1."""
    if config.kind == "expert_choice":
        reason = "with kind='expert_choice' a token's weights sum to anything from 0 up"
    elif config.capacity_factor is not None:
        reason = f"capacity_factor={config.capacity_factor} may drop tokens"
    elif config.num_experts > 1 and (config.kind == "switch" or not config.normalize):
        reason = "weights that are raw probabilities sum to less than 1"
    else:
        return
    raise ValueError(
        f"config: {reason}, so the model would not start as the dense one; accepted is kind='top_k' with "
        "normalize=True, top_k >= 2 and capacity_factor=None: change the config or pass exact=False"
    )


def _find(model: nn.Module) -> dict[str, _Family]:
    found = {}
    for name, owner in model.named_modules():
        family = next((family for family in _FAMILIES if _matches(owner, family)), None)
        if family is not None and (name or family.slot):  # the model itself has no parent to hold its replacement
            found[name] = family
    if not found:
        known = "; ".join(f"{f.name} ({', '.join((*f.up, f.down, f.activation))})" for f in _FAMILIES)
        raise ValueError(f"model: no feed-forward layer found in {type(model).__name__}; accepted are {known}")
    return found


def _matches(owner: nn.Module, family: _Family) -> bool:
    ups = [_part(owner, path) for path in family.up]
    down = _part(owner, family.down)
    if any(type(linear) is not nn.Linear for linear in (*ups, down)) or not callable(_part(owner, family.activation)):
        return False
    if any(up.weight.shape != down.weight.shape[::-1] for up in ups):
        return False
    own = {path.split(".")[0] for path in (*family.up, family.down, family.activation)}
    others = [_part(child, "weight") for name, child in owner.named_children() if name not in own]
    shapes = {tuple(weight.shape) for weight in others if isinstance(weight, Tensor)}
    # A normalisation of hidden values, as in Kosmos-2, would come to act on the result.
    return down.in_features == down.out_features or (down.in_features,) not in shapes


def _choose(found: dict[str, _Family], layers: Sequence[str] | None) -> dict[str, _Family]:
    if layers is None:
        return found
    if isinstance(layers, str):
        raise TypeError(f"layers: got the string {layers!r}; accepted is a sequence of patterns: pass [{layers!r}]")
    for pattern in layers:
        if not any(fnmatchcase(name, pattern) for name in found):
            raise ValueError(
                f"layers: {pattern!r} matches no feed-forward layer; accepted are patterns of {list(found)}"
            )
    chosen = {name: family for name, family in found.items() if any(fnmatchcase(name, p) for p in layers)}
    if not chosen:
        raise ValueError(f"layers: got no pattern; accepted are patterns of {list(found)}, or None for all of them")
    return chosen


@torch.no_grad()
def _check_function(name: str, owner: nn.Module, family: _Family) -> None:
    """An owner that is the whole feed-forward layer must compute what its parts suggest, with no hidden extra."""
    if family.slot:
        return
    ups, down, activation = _parts(owner, family)
    x_TM = torch.linspace(-1, 1, 4 * down.out_features).view(4, -1).to(down.weight.device, ups[0].weight.dtype)
    hidden_TH = activation(ups[0](x_TM))
    if len(ups) == 2:
        hidden_TH = hidden_TH * ups[1](x_TM)
    expected_TM = down(hidden_TH.to(down.weight.dtype))
    training = owner.training
    actual_TM = owner.eval()(x_TM)
    owner.train(training)
    half_the_digits = torch.finfo(x_TM.dtype).eps ** 0.5
    if (actual_TM - expected_TM).abs().max() > half_the_digits * expected_TM.abs().max():
        raise ValueError(
            f"model: {name!r} ({type(owner).__name__}) has the parts of {family.name} but computes something else; "
            "accepted is down(activation(up(x))): leave it out with `layers`"
        )


def _build(owner: nn.Module, family: _Family, config: GateConfig, noise_std: float) -> tuple[FeedForwardExperts, Gate]:
    ups, down, activation = _parts(owner, family)
    experts = FeedForwardExperts(
        config.num_experts,
        down.out_features,
        down.in_features,
        activation=activation,
        gated=len(ups) == 2,
        bias=any(linear.bias is not None for linear in (*ups, down)),
        dropout=_dropout(owner, family),
    )
    _copy(ups, experts.up, noise_std)
    _copy([down], experts.down, noise_std)
    gate = Gate(config, down.out_features).to(down.weight.device, ups[0].weight.dtype)
    return experts, gate


@torch.no_grad()
def _copy(linears: Sequence[nn.Linear], grouped: GroupedLinear, noise_std: float) -> None:
    """Every expert becomes the linear maps, one above the other, plus its own noise."""
    copies = grouped.num_experts
    weights: list[Tensor] = [linear.weight for linear in linears]
    weight_EOI = torch.cat(weights).repeat(copies, 1, 1)
    if noise_std > 0:
        std_O1 = torch.cat([weight.std().expand(len(weight), 1) for weight in weights])
        weight_EOI += noise_std * std_O1 * torch.randn(weight_EOI.shape).to(weight_EOI)
    grouped.weight = nn.Parameter(weight_EOI)
    if grouped.bias is not None:
        zeros = [weight.new_zeros(len(weight)) for weight in weights]
        biases: list[Tensor] = [
            zero if linear.bias is None else linear.bias for linear, zero in zip(linears, zeros, strict=True)
        ]
        grouped.bias = nn.Parameter(torch.cat(biases).repeat(copies, 1))


def _install(model: nn.Module, name: str, family: _Family, moe: MoEFeedForward) -> None:
    if not family.slot:
        model.set_submodule(name, moe)
        return
    owner = model.get_submodule(name)
    if family.dropout and hasattr(owner, family.dropout):
        setattr(owner, family.dropout, 0.0)  # the experts drop hidden values themselves
    for path in family.idle:
        parent, _, part = path.rpartition(".")
        idle = nn.Identity().train(owner.training)
        setattr(owner.get_submodule(parent), part, idle)  # not set_submodule: an activation may be a plain function
    owner.set_submodule(family.slot, moe)


def _parts(owner: nn.Module, family: _Family) -> tuple[list[nn.Linear], nn.Linear, Callable[[Tensor], Tensor]]:
    return [_part(owner, path) for path in family.up], _part(owner, family.down), _part(owner, family.activation)


def _dropout(owner: nn.Module, family: _Family) -> float:
    dropout = _part(owner, family.dropout) if family.dropout else None
    return dropout.p if isinstance(dropout, nn.Dropout) else float(dropout or 0.0)


def _part(owner: nn.Module, path: str) -> Any:
    try:
        return attrgetter(path)(owner)
    except AttributeError:
        return None
