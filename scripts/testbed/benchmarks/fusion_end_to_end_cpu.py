"""Whole networks on a CPU, compiled with our back end, beside what a user would run instead: encoders and training."""

from dataclasses import replace

from configs.schema import Config
from configs.typed import ConfigError, closest
from scripts.testbed import launch
from scripts.testbed.benchmarks.cpu_contests import Cases, geomean, least, over, rows, run_contests, sections
from scripts.testbed.peer_processes.network import Network
from scripts.testbed.peer_processes.roster import NETWORK_PEERS, OWN_NETWORKS
from scripts.testbed.rows import headlines


def _bert(num_layers: int, width: int, num_heads: int, *, batch: int, length: int, backward: bool = False) -> Network:
    return Network(
        kind="bert", num_layers=num_layers, width=width, num_heads=num_heads, hidden=4 * width, vocabulary=30522,
        batch=batch, length=length, backward=backward,
    )  # fmt: skip


INFERENCE = {
    "bert_small": _bert(4, 512, 8, batch=1, length=512),
    "bert_base": _bert(12, 768, 12, batch=1, length=512),
    "bert_large": _bert(24, 1024, 16, batch=1, length=512),
}
TRAINING = {  # the quartet's network is its demo's, without the methods, on as many tokens as its batches have
    "minilm": _bert(6, 384, 12, batch=8, length=128, backward=True),
    "quartet": Network(
        kind="pegasus", num_layers=3, width=192, num_heads=4, hidden=768, vocabulary=4000, batch=16, length=64,
        backward=True,
    ),
}  # fmt: skip


def bench(config: Config, run: launch.Run) -> launch.Outcome:
    """Time every network with every number of threads.

    Args:
        config: The run's configuration: `bench.cpu`.
        run: Where to write.

    Raises:
        ConfigError: Where a network or a peer is unknown.
    """
    cpu = config.bench.cpu
    for name in cpu.shapes:
        if name not in INFERENCE and name not in TRAINING:
            raise ConfigError(f"bench.cpu.shapes: got {name!r}, {closest(name, tuple(INFERENCE | TRAINING))}")
    chosen = [
        (name, _shrunk(network) if config.smoke else network)
        for group in ((INFERENCE,) if config.smoke else (INFERENCE, TRAINING))  # which the compiler takes minutes for
        for name, network in list(group.items())[: cpu.num_shapes]
        if name in (cpu.shapes or (name,))
    ]
    found = run_contests(chosen, config, run.folder, own=OWN_NETWORKS, peers=NETWORK_PEERS)
    summary = _summary(found)
    note = "Random weights, fp32, no dropout; a training step is forward and backward, without the optimizer."
    return launch.Outcome(
        rows=(*rows(found), *headlines("fusion", summary)),
        summary=summary,
        sections=sections(found, "Networks", note),
        versions=found.versions,
    )


def _shrunk(network: Network) -> Network:
    """What is compiled in seconds."""
    return replace(
        network, num_layers=1, width=32, num_heads=2, hidden=64, vocabulary=64, batch=min(network.batch, 2), length=16
    )


def _summary(found: Cases) -> dict[str, float | int | str | None]:
    """Headlines: the worst over numbers of threads."""
    inference, training = found.of(backward=False), found.of(backward=True)
    return {
        "bert_speedup_eager_min": least(inference, over("torch_eager")),
        "bert_speedup_compile_min": least(inference, over("torch_compile")),
        "bert_best_peer_ratio_min": least(inference, over()),
        "bert_best_peer_ratio_geomean": geomean(inference, over()),
        "train_speedup_eager": least(training, over("torch_eager")),
        "train_speedup_compile": least(training, over("torch_compile")),
        "others_share": found.others_share,
    }
