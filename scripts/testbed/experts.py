"""What the experts of a trained network have become: how the load is shared, and how alike they are.

E: experts, T: tokens, M: model width, B: sentences
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import moe_pipeline
import omoe
from moe_pipeline.run.ranks import gather_experts
from scripts.testbed import plots
from scripts.testbed.quartet import QuartetModel
from scripts.testbed.report import Section
from scripts.testbed.rows import Row
from scripts.testbed.tasks.task import Example, Task

NUM_SENTENCES = 64
MAPS_PER_ROW = 3
NUM_TOKENS = 512  # every expert sees all of them; more changes no figure in the second digit


@dataclass(frozen=True, kw_only=True)
class LayerMeasure:
    """Load and similarity of the experts of one layer on a held-out batch."""

    name: str
    load_share_E: tuple[float, ...]
    """Share of the routed rows each expert computed."""
    similarity_EE: tuple[tuple[float, ...], ...]
    """Cosine of the outputs of each pair of experts, averaged over tokens that are sent to every expert."""
    similarity: float
    """Mean of the pairs."""
    variation: float
    """Variance over experts against mean squared norm; 0 for copies."""


@torch.no_grad()
def measure(model: QuartetModel, task: Task) -> list[LayerMeasure]:
    """Send a fixed validation batch through the network, and each layer's input to its every expert.

    Args:
        model: A network with or without experts.
        task: Gives the batch: its first validation sentences by length.

    Returns:
        One measure per MoE layer, in the network's order; none for a dense network.
    """
    if not model.has_experts:
        return []
    model.eval()
    device = next(model.parameters()).device
    batch = {name: value.to(device) for name, value in task.collate(_held_out(task.splits.valid)).items()}
    layers = {name: layer for name, layer in model.network.named_modules() if isinstance(layer, moe_pipeline.MoELayer)}
    inputs: dict[str, Tensor] = {}
    handles = [layer.register_forward_pre_hook(_keep(inputs, name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with model.routed(batch["attention_mask"], batch["labels"]) as records:
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return [_measure_layer(name, layer, inputs[name], records[name][0]) for name, layer in layers.items()]


def rows(measures: Sequence[LayerMeasure], provider: str) -> tuple[Row, ...]:
    """Mean similarity and variation, and the load of the busiest expert against an equal share."""
    if not measures:
        return ()
    busiest = max(max(measure.load_share_E) * len(measure.load_share_E) for measure in measures)
    return (
        Row(
            provider=provider, metric="expert_similarity", unit="cosine", value=_mean([m.similarity for m in measures])
        ),
        Row(provider=provider, metric="expert_variation", unit="ratio", value=_mean([m.variation for m in measures])),
        Row(provider=provider, metric="expert_load_max", unit="x equal share", value=busiest),
    )


def summary(measures: Sequence[LayerMeasure]) -> dict[str, float]:
    """The mean similarity under its stable name."""
    return {"expert_similarity": _mean([measure.similarity for measure in measures])} if measures else {}


def sections(before: Sequence[LayerMeasure], after: Sequence[LayerMeasure]) -> tuple[Section, ...]:
    """Load and similarity before and after training, as pictures."""
    if not after:
        return ()
    load = {measure.name: measure.load_share_E for measure in after}
    note = "Each layer's input on a held-out batch is sent to its every expert; 1 means the experts answer alike."
    return (
        Section(
            title="Expert load",
            note="Share of routed tokens on a held-out batch.",
            plots=(plots.bars(load, title="Expert load", x_label="expert", y_label="share of tokens"),),
        ),
        Section(title="Expert similarity", note=note, plots=(*_maps(before, "before"), *_maps(after, "after"))),
    )


def _maps(measures: Sequence[LayerMeasure], when: str) -> list[str]:
    maps = []
    for start in range(0, len(measures), MAPS_PER_ROW):
        part = {measure.name: measure.similarity_EE for measure in measures[start : start + MAPS_PER_ROW]}
        maps.append(plots.heat_maps(part, title=f"Cosine of expert outputs {when} training", low=0.0, high=1.0))
    return maps


def _measure_layer(name: str, layer: moe_pipeline.MoELayer, x: Tensor, record: moe_pipeline.MoERecord) -> LayerMeasure:
    x_TM = x.flatten(0, -2)[:NUM_TOKENS].float()
    ranks, num_experts = layer.ranks, len(record.load_E)
    local = num_experts if ranks is None else ranks.local_experts(num_experts)
    outputs_ETM = omoe.expert_outputs(layer.experts, x_TM, num_experts=local)
    if ranks is not None:  # every rank measures the same batch
        outputs_ETM = gather_experts(outputs_ETM, ranks)
    similarity_EE = omoe.output_cosine(outputs_ETM)
    share_E = record.load_E / record.load_E.sum().clamp(min=1)
    return LayerMeasure(
        name=name.removeprefix("model.").removesuffix(".moe"),
        load_share_E=tuple(share_E.tolist()),
        similarity_EE=tuple(tuple(row) for row in similarity_EE.tolist()),
        similarity=float(omoe.mean_pairwise(similarity_EE)),
        variation=float(omoe.variation(outputs_ETM)),
    )


def _held_out(valid: Sequence[Example]) -> Sequence[Example]:
    step = max(1, len(valid) // NUM_SENTENCES)
    return valid[::step][:NUM_SENTENCES]


def _keep(inputs: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        x = args[0] if args else kwargs["x"]
        mask = kwargs.get("mask")
        inputs[name] = x if mask is None else x[mask]

    return hook


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
