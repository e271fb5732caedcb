"""CPU threads: every candidate number measured on real training steps, and the fastest kept."""

import os

import torch

from configs.schema import Config
from scripts.testbed import launch, threads
from scripts.testbed.batches import EpochRows, TokenBatches
from scripts.testbed.precision import resolve
from scripts.testbed.quartet import QuartetModel
from scripts.testbed.quartet import build as build_model
from scripts.testbed.report import Section, Table
from scripts.testbed.rows import Row
from scripts.testbed.tasks.build import build as build_task
from scripts.testbed.tasks.task import Task
from scripts.testbed.timing import Timing, compare


def tune(config: Config, run: launch.Run) -> launch.Outcome:
    """Measure every candidate number of CPU threads on real training steps, and keep the fastest.

    Args:
        config: The run's configuration.
        run: Where to write.
    """
    task = build_task(config, run.folder)
    model = build_model(config, task, moe=config.moe.enabled)
    candidates = config.tune.candidates or powers_of_two(os.cpu_count() or 1)
    steps = {str(count): _steps(config, task, model, count) for count in candidates}
    timings = compare(steps, repeats=config.tune.rounds, warmup=1)
    best = min(timings, key=lambda name: timings[name].median_us)
    kept = threads.keep(threads.key(config), int(best))
    return launch.Outcome(
        rows=tuple(
            Row(
                provider=f"{name} threads",
                metric="train_step_time",
                unit="us",
                value=timing.median_us,
                low=timing.low_us,
                high=timing.high_us,
            )
            for name, timing in timings.items()
        ),
        summary={"threads": int(best), "cache": str(kept)},
        sections=(_section(config, timings, best),),
    )


def powers_of_two(limit: int) -> tuple[int, ...]:
    """1, 2, 4 ... up to the limit, and the limit itself."""
    found = {1 << power for power in range(limit.bit_length()) if 1 << power <= limit}
    return tuple(sorted(found | {limit}))


def _steps(config: Config, task: Task, model: QuartetModel, count: int):  # type: ignore[no-untyped-def]
    rows = EpochRows(task.splits.train)
    lengths = [len(row["input_ids"]) for row in task.splits.train]
    order = TokenBatches(
        lengths, batch_tokens=config.trainer.batch_tokens, num_batches=config.tune.steps, seed=config.seed
    )
    batches = [task.collate([rows[key] for key in batch]) for batch in order]
    bf16 = resolve(config.trainer.precision, config.cluster.device) == "bf16"

    def run() -> None:
        torch.set_num_threads(count)
        model.train()
        for batch in batches:
            model.zero_grad(set_to_none=True)
            with torch.autocast(config.cluster.device, torch.bfloat16, enabled=bf16):
                loss = model(**batch)["loss"]
            loss.backward()

    return run


def _section(config: Config, timings: dict[str, Timing], best: str) -> Section:
    rows = tuple(
        (
            name,
            f"{timing.median_us / config.tune.steps / 1e3:.1f} ms",
            "kept" if name == best else f"{timing.ratio:.2f} x",
        )
        for name, timing in timings.items()
    )
    return Section(
        title="CPU threads",
        note=f"{len(timings)} candidates, all measured: {config.tune.rounds} alternated rounds of {config.tune.steps} "
        "training steps without the optimizer. The winner is used by train on this machine for this network.",
        table=Table(headers=("Threads", "Step", f"Against {next(iter(timings))}"), rows=rows),
    )
