"""A layer that chooses its chunks while the link and the batch change under it, against every fixed choice.

The links follow each other, each for the same number of steps; the batch changes every few steps. Beside every visit of
a batch, one step of each fixed chunk count runs on the same link and data: the fastest of them, per link and batch, is
the oracle, which no search can know beforehand.
"""

import logging
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from configs.schema import Config
from moe_pipeline import MoELayer, PipelineConfig
from moe_pipeline.plan.budget import CHUNK_COUNTS
from moe_pipeline.run.buffers import Workspace
from moe_pipeline.run.ranks import expert_ranks
from scripts.testbed import launch, plots
from scripts.testbed.benchmarks.own_layer import alternate, own_layer, sizes_of, step
from scripts.testbed.link import joined, label
from scripts.testbed.network import Host, set_rate
from scripts.testbed.peers import MoESizes
from scripts.testbed.ranks import run_ranks
from scripts.testbed.report import Section, Table
from scripts.testbed.rows import Row, headlines

logger = logging.getLogger(__name__)

NUM_RANKS = 2
VISIT_STEPS = 5
UNEVEN = 0.9  # tokens of rank 1 against those of rank 0
TIMEOUT_S = 7200.0


@dataclass(frozen=True, kw_only=True)
class Visit:
    """A few steps of one batch on one link."""

    link: str
    tokens: int
    steps_us: tuple[float, ...]
    """The adaptive layer's."""
    chunks: tuple[int, ...]
    """What it chose for each."""
    trials: tuple[bool, ...]
    """Which of them tried what was not known to be best."""
    fixed_us: dict[int, float]
    """Chunk count -> one step of the layer that always uses it."""


def bench(config: Config, run: launch.Run) -> launch.Outcome:
    """Run all links in turn.

    Args:
        config: The run's configuration; `bench.repeats` visits per link, each of five steps.
        run: Where to write.

    Raises:
        ConfigError: Where this machine cannot shape links.
    """
    bench = config.bench
    argument: dict[str, object] = {**asdict(bench), "seed": config.seed, "sizes": asdict(sizes_of(bench))}
    first = next(filter(None, bench.links_mbit), 0.0)
    with joined(NUM_RANKS, first, loopback="bench.links_mbit=[0]") as hosts:
        argument["hosts"] = [asdict(host) for host in hosts]
        logger.info("%d steps on %d links", bench.repeats * VISIT_STEPS * len(bench.links_mbit), len(bench.links_mbit))
        found = run_ranks(
            f"{__name__}:rank_main",
            argument,
            num_ranks=NUM_RANKS,
            folder=run.folder / "ranks",
            hosts=hosts,
            timeout_s=TIMEOUT_S,
        )
    visits = [_read(visit) for visit in found[0]["visits"]]
    disagreements = sum(
        mine != other
        for first, second in zip(found[0]["visits"], found[1]["visits"], strict=True)
        for mine, other in zip(first["chunks"], second["chunks"], strict=True)
    )
    summary = {**_summary(visits), "rank_disagreements": disagreements}
    return launch.Outcome(rows=tuple(_rows(visits, summary)), summary=summary, sections=(_section(config, visits),))


def _read(visit: dict[str, Any]) -> Visit:
    return Visit(
        link=visit["link"],
        tokens=visit["tokens"],
        steps_us=tuple(visit["steps_us"]),
        chunks=tuple(visit["chunks"]),
        trials=tuple(visit["trials"]),
        fixed_us={int(chunks): time_us for chunks, time_us in visit["fixed_us"].items()},
    )


def rank_main(rank: int, num_ranks: int, argument: dict[str, Any]) -> dict[str, Any]:
    """One rank's part.

    Args:
        rank: This rank.
        num_ranks: Number of ranks.
        argument: The bench section, the layer's sizes, a seed and the hosts.

    Returns:
        `visits`: the fields of `Visit` each.
    """
    torch.manual_seed(argument["seed"] + rank)
    own = {
        "sizes": MoESizes(**argument["sizes"]),
        "seed": argument["seed"],
        "ranks": expert_ranks(),
        "workspace": Workspace(),
    }
    layers = {n: own_layer(**own, pipeline=PipelineConfig(num_chunks=n), name=f"n{n}") for n in CHUNK_COUNTS}
    adaptive_layer = own_layer(**own, pipeline=PipelineConfig(num_chunks="auto"))
    data = {
        tokens: torch.randn(2, int(tokens * (UNEVEN if rank else 1)), argument["d_model"])
        for tokens in argument["batch_tokens"]
    }
    hosts = [Host(**host) for host in argument["hosts"]]
    for tokens in argument["batch_tokens"]:  # memory and code are warm before anything is timed
        for layer in layers.values():
            step(layer, *data[tokens])
    visits = []
    for rate_mbit, tokens in _order(argument):
        if rate_mbit is not None:
            dist.barrier()
            if rank == 0 and hosts:
                set_rate(hosts, rate_mbit)
            dist.barrier()
            name = label(rate_mbit)
        visits.append({"link": name, "tokens": tokens, **_visit(adaptive_layer, layers, data[tokens])})
    return {"visits": visits}


def _order(argument: dict[str, Any]) -> Iterator[tuple[float | None, int]]:
    """(the link where it changes, the batch) of every visit, the same on all ranks."""
    generator = torch.Generator().manual_seed(argument["seed"])
    batches = argument["batch_tokens"]
    for rate_mbit in argument["links_mbit"]:
        picked: list[int] = []
        while len(picked) < argument["repeats"]:
            picked += [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]
        for number, tokens in enumerate(picked[: argument["repeats"]]):
            yield (rate_mbit if number == 0 else None), tokens


def _visit(adaptive_layer: MoELayer, layers: dict[int, MoELayer], data: torch.Tensor) -> dict[str, Any]:
    adaptive = adaptive_layer.adaptive
    assert adaptive is not None, "its chunks are chosen"
    steps_us, chunks, trials = [], [], []
    for _ in range(VISIT_STEPS):
        before = adaptive.trial_steps
        found = alternate({"adaptive": lambda: step(adaptive_layer, *data)}, repeats=1, warmup=0)
        steps_us += found["adaptive"]
        assert adaptive.last is not None, "a step has run"
        chunks.append(adaptive.last.fixed_chunks)
        trials.append(adaptive.trial_steps > before)
    fixed = {str(n): (lambda layer=layer: step(layer, *data)) for n, layer in layers.items()}
    fixed_us = {n: times[0] for n, times in alternate(fixed, repeats=1, warmup=0).items()}
    return {"steps_us": steps_us, "chunks": chunks, "trials": trials, "fixed_us": fixed_us}


def oracle(visits: Sequence[Visit]) -> dict[tuple[str, int], tuple[int, float]]:
    """The best fixed chunk count of every link and batch, and its median time.

    Args:
        visits: Of a run.
    """
    cases: dict[tuple[str, int], list[dict[int, float]]] = {}
    for visit in visits:
        cases.setdefault((visit.link, visit.tokens), []).append(visit.fixed_us)
    found = {}
    for case, rounds in cases.items():
        medians = {n: statistics.median(fixed[n] for fixed in rounds) for n in rounds[0]}
        best = min(medians, key=medians.__getitem__)
        found[case] = (best, medians[best])
    return found


def _summary(visits: Sequence[Visit]) -> dict[str, float | int | str | None]:
    best = oracle(visits)
    spent_us = sum(sum(visit.steps_us) for visit in visits)
    oracle_us = sum(best[visit.link, visit.tokens][1] * len(visit.steps_us) for visit in visits)
    search_us = sum(
        max(0.0, time_us - best[visit.link, visit.tokens][1])
        for visit in visits
        for time_us, trial in zip(visit.steps_us, visit.trials, strict=True)
        if trial
    )
    fixed_us = {n: sum(visit.fixed_us[n] * len(visit.steps_us) for visit in visits) for n in visits[0].fixed_us}
    return {
        "regret_vs_oracle": spent_us / oracle_us,
        "search_overhead": search_us / spent_us,
        "steps": sum(len(visit.steps_us) for visit in visits),
        "trial_steps": sum(sum(visit.trials) for visit in visits),
        "speedup_vs_n1": fixed_us[1] / spent_us,
        "speedup_vs_best_single_n": min(fixed_us.values()) / spent_us,
    }


def _rows(visits: Sequence[Visit], summary: dict[str, float | int | str | None]) -> list[Row]:
    rows = []
    for (link, tokens), (best, time_us) in oracle(visits).items():
        own = [time for visit in _of(visits, link, tokens) for time in visit.steps_us]
        metric = f"step_time_{link}_{tokens}"
        rows.append(Row(provider="adaptive", metric=metric, unit="us", value=statistics.median(own)))
        rows.append(Row(provider="oracle", metric=metric, unit="us", value=time_us))
        rows.append(Row(provider="oracle", metric=f"chunks_{link}_{tokens}", unit="chunks", value=float(best)))
    return [*rows, *headlines("adaptive", summary)]


def _of(visits: Sequence[Visit], link: str, tokens: int) -> list[Visit]:
    return [visit for visit in visits if (visit.link, visit.tokens) == (link, tokens)]


def _section(config: Config, visits: Sequence[Visit]) -> Section:
    best = oracle(visits)
    chosen = [float(n) for visit in visits for n in visit.chunks]
    wanted = [float(best[visit.link, visit.tokens][0]) for visit in visits for _ in visit.chunks]
    ratio = [time / best[visit.link, visit.tokens][1] for visit in visits for time in visit.steps_us]
    numbers = [float(number) for number in range(len(chosen))]
    table = Table(
        headers=("Link", "Tokens", "Oracle", "Its step", "Adaptive, median", "Chosen last"),
        rows=tuple(
            (
                link,
                f"{tokens:,}",
                f"n={n}",
                f"{time_us / 1e3:.1f} ms",
                f"{statistics.median(time for v in _of(visits, link, tokens) for time in v.steps_us) / 1e3:.1f} ms",
                f"n={_of(visits, link, tokens)[-1].chunks[-1]}",
            )
            for (link, tokens), (n, time_us) in sorted(best.items())
        ),
    )
    bench = config.bench
    return Section(
        title="A layer that chooses",
        note=f"{NUM_RANKS} ranks, one core each, {UNEVEN:.0%} of the tokens on the second; width {bench.d_model}, "
        f"hidden {bench.d_hidden}, {bench.num_experts} experts, top {bench.top_k}, fp32, forward and backward. "
        f"Links in turn: {', '.join(dict.fromkeys(visit.link for visit in visits))}; the batch changes every "
        f"{VISIT_STEPS} steps. The oracle is the best fixed chunk count of each link and batch, measured beside.",
        plots=(
            plots.curves(
                {"chosen": (numbers, chosen), "oracle": (numbers, wanted)}, title="Chunks", x_label="step", y_label="n"
            ),
            plots.curves(
                {"adaptive": (numbers, ratio)}, title="Step against the oracle's", x_label="step", y_label="ratio"
            ),
        ),
        table=table,
    )
