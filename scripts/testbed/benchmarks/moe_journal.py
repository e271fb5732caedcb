"""The journal's breakdown on its second cluster and its scaling to eight nodes of the first; predictions."""

from dataclasses import asdict, replace

from configs.schema import Config
from moe_pipeline import PipelineConfig
from moe_pipeline.plan.device import Device, Speed, load_device
from moe_pipeline.plan.ledger import LayerShape
from moe_pipeline.plan.schedule import Stream
from scripts.testbed import launch, plots
from scripts.testbed.benchmarks.moe_paper import (
    BREAKDOWN,
    BREAKDOWN_CHUNKS,
    OVERLAP_EFFICIENCY,
    SCALING_AT_8_NODES,
    SCALING_NODES,
    Breakdown,
    K,
)
from scripts.testbed.benchmarks.moe_paper_layer import (
    CLUSTER,
    SEQUENTIAL,
    best_chunks,
    busy_us,
    paper_shape,
    pipelined,
    sides,
    time_us,
    without_tensor_cores,
)
from scripts.testbed.report import Section, Table
from scripts.testbed.rows import Row, headlines

SECOND_CLUSTER = "v100_ib56"
SECOND_RANKS = 16
NUM_TOKENS = 16 * K
SPLIT = PipelineConfig(num_chunks=BREAKDOWN_CHUNKS, overlap=False)
SCALED_MODEL = "MoE-GPT3-XL"
NODE_SHARES = (0.5, 0.3, 0.2)


def bench(config: Config, run: launch.Run) -> launch.Outcome:
    """Simulate the breakdown and the scaling.

    Args:
        config: The run's configuration.
        run: Where to write.
    """
    second, first = load_device(SECOND_CLUSTER), load_device(CLUSTER)
    found = {model: breakdown(_second_shape(model), second) for model in BREAKDOWN}
    reached = {model: efficiency(_second_shape(model), second) for model in BREAKDOWN}
    scaled = {num_nodes: scaling(first, num_nodes) for num_nodes in SCALING_NODES}
    slowed = {share: scaling(with_node_share(first, share), 8) for share in NODE_SHARES}
    rows = [
        Row(provider=f"{model}{whose}", metric=f"saved_{name}", unit="share", value=value, kind=kind)
        for whose, kind, table in sides(found, BREAKDOWN)
        for model, shares in table.items()
        for name, value in asdict(shares).items()
    ]
    rows += [
        Row(provider=SCALED_MODEL, metric=f"speed_{num_nodes}_nodes", unit="x", value=value)
        for num_nodes, value in scaled.items()
    ]
    paper = Row(
        provider=f"{SCALED_MODEL}, paper", metric="speed_8_nodes", unit="x", value=SCALING_AT_8_NODES, kind="paper"
    )
    summary: dict[str, float | int | str | None] = {
        "scaling_8_nodes": scaled[8],
        "paper_scaling_8_nodes": SCALING_AT_8_NODES,
        **{f"overlap_efficiency_{model}": value for model, value in reached.items()},
        "paper_overlap_efficiency": OVERLAP_EFFICIENCY,
        "largest_breakdown_difference": max(
            abs(ours - printed)
            for model in BREAKDOWN
            for ours, printed in zip(asdict(found[model]).values(), asdict(BREAKDOWN[model]).values(), strict=True)
        ),
    }
    sections = (_breakdown_section(second, found, reached), _scaling_section(scaled, slowed))
    return launch.Outcome(
        kind="simulated", rows=(*rows, paper, *headlines("moe_pipeline", summary)), summary=summary, sections=sections
    )


def breakdown(shape: LayerShape, device: Device) -> Breakdown:
    """What tensor cores, splitting and overlap save of a sequential step.

    Args:
        shape: The layer.
        device: Where.
    """
    fp32 = without_tensor_cores(device)
    plain_us, step_us = time_us(shape, SEQUENTIAL, fp32), time_us(shape, SEQUENTIAL, device)
    split_us = time_us(shape, SPLIT, device)
    return Breakdown(
        compute_by_tensor_cores=1 - _both(shape, device, "compute") / _both(shape, fp32, "compute"),
        step_by_tensor_cores=1 - step_us / plain_us,
        step_by_splitting=1 - split_us / step_us,
        compute_and_messages_by_overlap=1 - time_us(shape, pipelined(BREAKDOWN_CHUNKS), device) / split_us,
    )


def efficiency(shape: LayerShape, device: Device) -> float:
    """The longer of compute and messages, over the step that overlaps them.

    Args:
        shape: The layer.
        device: Where.
    """
    longer_us = max(_both(shape, device, stream) for stream in ("compute", "comm"))
    return longer_us / time_us(shape, pipelined(BREAKDOWN_CHUNKS), device)


def scaling(device: Device, num_nodes: int) -> float:
    """Tokens per second over those of one node, with one expert and equally many tokens on every rank.

    Args:
        device: Where.
        num_nodes: How many.
    """
    times_us = [_scaled_us(device, nodes * device.ranks_per_node) for nodes in (1, num_nodes)]
    return num_nodes * times_us[0] / times_us[1]


def with_node_share(device: Device, share: float) -> Device:
    """The same device with slower links between nodes.

    Args:
        device: Any.
        share: Of their rate.
    """
    speed = device.node_message
    points = tuple((volume, share * rate) for volume, rate in speed.points)
    return replace(device, node_message=Speed(speed.latency_us, points))


def _scaled_us(device: Device, num_ranks: int) -> float:
    shape = paper_shape(SCALED_MODEL, NUM_TOKENS, num_ranks=num_ranks, num_experts=num_ranks)
    return time_us(shape, pipelined(best_chunks(shape, device)), device)


def _second_shape(model: str) -> LayerShape:
    return paper_shape(model, NUM_TOKENS, num_ranks=SECOND_RANKS, num_experts=SECOND_RANKS)


def _both(shape: LayerShape, device: Device, stream: Stream) -> float:
    return busy_us(shape, SEQUENTIAL, device)[stream]


def _breakdown_section(device: Device, found: dict[str, Breakdown], reached: dict[str, float]) -> Section:
    names = list(asdict(next(iter(found.values()))))
    cells = [
        (model, name, f"{asdict(found[model])[name]:+.2f}", f"{asdict(BREAKDOWN[model])[name]:+.2f}")
        for model in found
        for name in names
    ]
    cells += [
        (model, "longer stream over step", f"{value:.2f}", f"{OVERLAP_EFFICIENCY:.2f}")
        for model, value in reached.items()
    ]
    return Section(
        title="Breakdown on the second cluster",
        note=f"Predicted: 16 ranks with one expert each and {NUM_TOKENS} tokens, which stands for the journal's batch "
        f"of 32 sequences, whose length it does not give. {device.origin}",
        table=Table(headers=("Model", "Share saved", "Ours", "Paper"), rows=tuple(cells)),
    )


def _scaling_section(scaled: dict[int, float], slowed: dict[float, float]) -> Section:
    nodes = [float(num_nodes) for num_nodes in scaled]
    lines = {"ours": (nodes, list(scaled.values())), "ideal": (nodes, nodes)}
    return Section(
        title="Scaling to eight nodes",
        note="Predicted with the device that was fitted on figure 12: MoE-GPT3-XL, 16k tokens and one expert on every "
        f"rank. The paper reaches {SCALING_AT_8_NODES} on 8 nodes. On the fitted device most of the messages hide, so "
        "that little is lost; the last lines show how slow the links between nodes would have to be. Only the layer is "
        "simulated, with ranks that take equally long; the journal itself names jitter of its network.",
        plots=(plots.curves(lines, title="Speed over one node", x_label="nodes", y_label="x"),),
        table=Table(
            headers=("Nodes", "Speed"),
            rows=(
                *((str(nodes), f"{value:.2f} x") for nodes, value in scaled.items()),
                *((f"8, links at {share:.0%} of their rate", f"{value:.2f} x") for share, value in slowed.items()),
            ),
        ),
    )
