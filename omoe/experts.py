"""Which parameters are experts' linears, and how each is seen as one stacked tensor.

Shapes: E experts, O output features, I input features.
"""

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from omoe.config import Linears

STACKED = re.compile(r"(?:.*\.)?experts\.[^.]+")
HELD = re.compile(r"(?:.*\.)?experts")
LISTED = re.compile(r"(?P<experts>(?:.*\.)?experts)\.(?P<expert>\d+)\.(?P<linear>[^.]+)")
Observed = Literal["rows", "choices", "inside"]
UP_NAMES = frozenset({"up", "up_proj", "gate", "gate_proj", "gate_up_proj", "fc1", "linear1", "w1", "w3", "wi"})
DOWN_NAMES = frozenset({"down", "down_proj", "fc2", "linear2", "w2", "wo"})


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertLinear:
    """One linear of every expert of one MoE layer.

    Raises:
        ValueError: The parameters are neither one (E, O, I) tensor nor E matrices of one shape and dtype.

    Source: not in the paper.
    """

    name: str
    """Unique within the model; the key of its state and of everything reported about it."""
    parameters: tuple[nn.Parameter, ...]
    """One stacked (E, O, I) parameter, or E parameters (O, I) in expert order."""
    modules: tuple[nn.Module, ...]
    """Whose inputs to observe: one module called with (rows, counts), or E modules called with their expert's rows."""
    observed: Observed = "rows"
    """What those modules are called with: rows as above; choices, tokens (T, I) and their experts (T, K), as in Hugging
    Face's classes; or inside, where this linear's inputs never pass a module's door."""

    def __post_init__(self) -> None:
        """Check the form of the parameters."""
        shapes = [tuple(parameter.shape) for parameter in self.parameters]
        stacked = len(shapes) == 1 and len(shapes[0]) == 3
        listed = bool(shapes) and all(len(shape) == 2 for shape in shapes)
        kinds = {(parameter.shape, parameter.dtype) for parameter in self.parameters}
        if not (stacked or listed) or len(kinds) != 1:
            raise ValueError(
                f"parameters of expert linear {self.name!r} have shapes {shapes}: give one stacked parameter "
                "(experts, d_out, d_in), or one (d_out, d_in) parameter per expert, all of one shape and dtype"
            )

    @property
    def is_stacked(self) -> bool:
        """Whether one parameter holds all experts."""
        return self.parameters[0].ndim == 3

    @property
    def shape_EOI(self) -> torch.Size:  # noqa: N802 (shape letters)
        """Shape of the stacked weight."""
        return torch.Size((len(self.parameters), *self.parameters[0].shape)[-3:])

    @property
    def num_experts(self) -> int:
        """E."""
        return self.shape_EOI[0]


def expert_weights(linear: ExpertLinear) -> tuple[Tensor, ...]:
    """Every expert's own (O, I) weight, sharing memory with the model and detached from autograd.

    Source: not in the paper.
    """
    if linear.is_stacked:
        return linear.parameters[0].detach().unbind(0)
    return tuple(parameter.detach() for parameter in linear.parameters)


def equal_experts(linear: ExpertLinear) -> bool:
    """Whether all experts have the same weights, as they have after upcycling.

    Source: not in the paper.
    """
    weights = expert_weights(linear)
    return all(torch.equal(weights[0], weight) for weight in weights[1:])


def stacked_EOI(linear: ExpertLinear) -> Tensor:  # noqa: N802 (shape letters)
    """All experts' weights as one (E, O, I) tensor: the parameter itself where it is stacked, else a copy.

    Source: not in the paper.
    """
    if linear.is_stacked:
        return linear.parameters[0].detach()
    return torch.stack(expert_weights(linear))


def find_expert_linears(model: nn.Module) -> tuple[ExpertLinear, ...]:
    """Find the experts' linears of a model by name and form.

    Args:
        model: Any module. Looked for, in the order of `model.named_modules()`, are
            - stacked: a module `...experts.<linear>` with a parameter `weight` of shape (experts, d_out, d_in) and a
              forward that takes (rows, counts), the rows sorted by expert;
            - held: a module `...experts` with parameters (experts, d_out, d_in) of its own and a forward that takes
              tokens and their experts: Mixtral, Qwen-MoE and OLMoE of Hugging Face;
            - listed: an `nn.Linear` `...experts.<number>.<linear>` for every number of the `nn.ModuleList` `experts`.

    Returns:
        One record per linear of a layer's experts, in the model's order.

    Raises:
        ValueError: Nothing of either form is in the model, or an expert lacks a linear that the others have.

    Source: not in the paper.
    """
    found: dict[str, list[nn.Module]] = {}
    sizes: dict[str, int] = {}
    held: dict[str, ExpertLinear] = {}
    for name, module in model.named_modules():
        if HELD.fullmatch(name):
            held |= {linear.name: linear for linear in _held(name, module)}
        listed = LISTED.fullmatch(name)
        if STACKED.fullmatch(name) and _takes_rows_and_counts(module):
            found[name], sizes[name] = [module], 1
        elif listed and isinstance(module, nn.Linear):
            experts = model.get_submodule(listed["experts"])
            if isinstance(experts, nn.ModuleList):
                listed_name = f"{listed['experts']}.{listed['linear']}"
                found.setdefault(listed_name, []).append(module)
                sizes[listed_name] = len(experts)
    linears = list(held.values())
    for name, modules in found.items():
        if len(modules) != sizes[name]:
            raise ValueError(
                f"model: {len(modules)} of {sizes[name]} experts have the linear {name!r}; give every expert the same"
            )
        parameters = tuple(module.get_parameter("weight") for module in modules)
        linears.append(ExpertLinear(name=name, parameters=parameters, modules=tuple(modules)))
    if not linears:
        raise ValueError(
            f"model: no expert linear in {type(model).__name__}. Looked for modules '...experts.<linear>' with weight "
            "(experts, d_out, d_in) and forward(rows, counts), for parameters '...experts.<linear>' of that shape, and "
            "for nn.Linear '...experts.<number>.<linear>' in an nn.ModuleList. Rename yours, or build ExpertLinear "
            "records by hand"
        )
    return tuple(linears)


def _held(name: str, module: nn.Module) -> list[ExpertLinear]:
    """The linears of experts whose module holds the stacked weights itself; biases have another shape."""
    if getattr(module, "is_transposed", False):
        raise ValueError(
            f"model: {name!r} ({type(module).__name__}) keeps its weights as (experts, d_in, d_out); accepted are "
            "(experts, d_out, d_in)"
        )
    linears = []
    for own, parameter in module.named_parameters(recurse=False):
        if parameter.ndim == 3:
            observed: Observed = "choices" if own in UP_NAMES else "inside"
            linears.append(
                ExpertLinear(name=f"{name}.{own}", parameters=(parameter,), modules=(module,), observed=observed)
            )
    return linears


def _takes_rows_and_counts(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 3:
        return False
    return len(inspect.signature(module.forward).parameters) >= 2


def select_linears(expert_linears: Sequence[ExpertLinear], linears: Linears) -> tuple[ExpertLinear, ...]:
    """The expert linears that `linears` names, by the last word of each one's name.

    Args:
        expert_linears: From `find_expert_linears`, or made by hand.
        linears: "up" for those whose last word is in `UP_NAMES`, "down" for `DOWN_NAMES`, "both" for all.

    Raises:
        ValueError: A name says neither up nor down though one is asked for, or none is of the kind asked for.

    Source: our definition, section 4.1, matrices.
    """
    if linears == "both":
        return tuple(expert_linears)
    wanted = UP_NAMES if linears == "up" else DOWN_NAMES
    for linear in expert_linears:
        if linear.name.rpartition(".")[2] not in UP_NAMES | DOWN_NAMES:
            raise ValueError(
                f"linears={linears!r}: cannot tell whether {linear.name!r} is up or down. Names understood are "
                f"{sorted(UP_NAMES)} and {sorted(DOWN_NAMES)}: rename it, select by hand, or set linears='both'"
            )
    selected = tuple(linear for linear in expert_linears if linear.name.rpartition(".")[2] in wanted)
    if not selected:
        names = [linear.name for linear in expert_linears]
        raise ValueError(f"linears={linears!r}: none of {names} is one of {sorted(wanted)}; set linears='both'")
    return selected
