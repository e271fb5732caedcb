"""How different the experts of a network's layers are, on held-out tokens that are sent to every expert.

E: experts, T: tokens, M: width, O: outputs and I: inputs of a linear map
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import moe_pipeline
import omoe
from omoe.diversity import change_size
from omoe.experts import stacked_EOI
from scripts.testbed.study.features import Features

MATRICES = ("output_cosine", "response_cosine", "change_cosine")
FIGURES = (*MATRICES, "centred_cosine", "variation", "change_size", "load_max")


@dataclass(frozen=True, kw_only=True)
class LayerDiversity:
    """The experts of one layer."""

    name: str
    figures: Mapping[str, float | None]
    """`FIGURES`, averaged over pairs of experts, and for change over both linears; None where undefined."""
    matrices: Mapping[str, Sequence[Sequence[float | None]]]
    """`MATRICES`, experts x experts."""
    load_E: Sequence[float]
    """Share of the held-out tokens' rows that each expert was given."""


class Diversity:
    """Remembers the experts' start and measures them against it.

    Args:
        network: With Mixtures of Experts whose experts are still copies.
        held_out: Where the tokens come from.
        num_tokens: How many are sent to every expert, from everywhere in the split.
    """

    def __init__(self, network: nn.Module, held_out: Features, *, num_tokens: int) -> None:
        self._network, self._features, self._num_tokens = network, held_out, num_tokens
        self._layers = {
            name: module for name, module in network.named_modules() if isinstance(module, moe_pipeline.MoELayer)
        }
        self._start = {name: copy.deepcopy(layer.experts) for name, layer in self._layers.items()}
        self._rows = _some_rows(held_out, num_tokens)

    @torch.no_grad()
    def measure(self) -> list[LayerDiversity]:
        """One measure a layer, in the network's order; the network is left in the mode it was in."""
        training = self._network.training
        self._network.eval()
        inputs: dict[str, list[Tensor]] = {name: [] for name in self._layers}

        def keep(name: str) -> Any:
            def hook(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
                inputs[name].append(args[0][kwargs["mask"]].float())

            return hook

        handles = []
        loads: dict[str, Tensor] = {}
        for rows in self._rows:
            h_BSM, mask_BS, _ = self._features.batch(rows)
            with moe_pipeline.routed(self._network, {"": mask_BS}) as records:
                handles = [
                    layer.register_forward_pre_hook(keep(name), with_kwargs=True)
                    for name, layer in self._layers.items()
                ]
                try:
                    self._network(h_BSM, mask_BS)
                finally:
                    for handle in handles:
                        handle.remove()
            for name, (record,) in records.items():
                loads[name] = loads.get(name, torch.zeros(())) + record.load_E
        self._network.train(training)
        return [self._layer(name, torch.cat(inputs[name]), loads[name]) for name in self._layers]

    def _layer(self, name: str, x_TM: Tensor, load_E: Tensor) -> LayerDiversity:
        experts, start = self._layers[name].experts, self._start[name]
        num_experts = len(load_E)
        x_TM = x_TM[torch.linspace(0, len(x_TM) - 1, min(self._num_tokens, len(x_TM))).long()]
        outputs_ETM = omoe.expert_outputs(experts, x_TM, num_experts=num_experts).double()
        start_1TM = omoe.expert_outputs(start, x_TM, num_experts=num_experts)[:1].double()
        linears = [(stacked_EOI(now), stacked_EOI(before)) for now, before in _linears(experts, start)]
        matrices = {
            "output_cosine": omoe.output_cosine(outputs_ETM),
            "response_cosine": omoe.output_cosine(outputs_ETM - start_1TM),
            "change_cosine": torch.stack([omoe.change_cosine(*pair) for pair in linears]).mean(0),
        }
        figures = {metric: float(omoe.mean_pairwise(matrix_EE)) for metric, matrix_EE in matrices.items()}
        figures["centred_cosine"] = float(omoe.mean_pairwise(omoe.output_cosine(outputs_ETM, centred=True)))
        figures["variation"] = float(omoe.variation(outputs_ETM))
        figures["change_size"] = float(torch.stack([change_size(*pair) for pair in linears]).mean())
        share_E = load_E / load_E.sum()
        figures["load_max"] = float(share_E.max()) * num_experts
        return LayerDiversity(
            name=name.removeprefix("layers.").removesuffix(".intermediate.moe"),
            figures={metric: _defined(value) for metric, value in figures.items()},
            matrices={
                metric: [[_defined(value) for value in row] for row in matrix_EE.tolist()]
                for metric, matrix_EE in matrices.items()
            },
            load_E=share_E.tolist(),
        )


def mean_figures(layers: Sequence[LayerDiversity]) -> dict[str, float]:
    """Every figure averaged over the layers that have it."""
    found: dict[str, float] = {}
    for metric in FIGURES:
        values = [value for layer in layers if (value := layer.figures[metric]) is not None]
        if values:
            found[metric] = sum(values) / len(values)
    return found


def _linears(experts: nn.Module, start: nn.Module) -> list[tuple[omoe.ExpertLinear, omoe.ExpertLinear]]:
    now, before = (omoe.find_expert_linears(nn.ModuleDict({"experts": module})) for module in (experts, start))
    return list(zip(now, before, strict=True))


def _some_rows(features: Features, num_tokens: int) -> list[list[int]]:
    """Rows from everywhere in a split with at least so many tokens together, in batches."""
    lengths = features.lengths
    for count in range(1, len(lengths) + 1):
        rows = [index * len(lengths) // count for index in range(count)]
        if sum(lengths[row] for row in rows) >= num_tokens:
            break
    return [rows[start : start + 16] for start in range(0, len(rows), 16)]


def _defined(value: float) -> float | None:
    return value if math.isfinite(value) else None
