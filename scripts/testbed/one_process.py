"""The control of a run on several ranks: the same training by one process, on the batches of all ranks together.

Each of its steps accumulates the gradients of the ranks' batches, which is the mean over ranks in another order of
summation. How far runs drift apart by that alone is seen by training it a few times more, each time with the sentences
of every batch in other orders.
"""

import dataclasses
import datetime
import itertools
import logging
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from configs.schema import Config
from configs.typed import build
from moe_pipeline.config import PipelineConfig
from scripts.testbed import checkpoints, history, plots, threads
from scripts.testbed.quartet import build as build_model
from scripts.testbed.ranks import run_ranks
from scripts.testbed.report import Section
from scripts.testbed.rows import Row
from scripts.testbed.tasks.build import build as build_task
from scripts.testbed.tasks.task import Example
from scripts.testbed.trainer import QuartetTrainer

logger = logging.getLogger(__name__)

NAMES = ("one_process", "one_process_reordered")
REORDERINGS = 4
COMPARED_STEPS = 50  # small differences grow from step to step; later ones say nothing about the sums
TIMEOUT_S = 24 * 3600.0
LAUNCHERS = ("TORCHELASTIC_", "MASTER_", "GROUP_", "ROLE_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


def train_all(config: Config, folder: Path, *, rank: int) -> dict[str, history.Points]:
    """Train the controls that are among a run's baselines, on its first rank, while the others wait.

    Args:
        config: The run's configuration.
        folder: Its folder.
        rank: Which of its ranks this is.

    Returns:
        Name -> steps and training losses; empty on all ranks but the first.
    """
    names = [NAMES[0]] * (NAMES[0] in config.baselines)
    names += [f"{NAMES[1]}_{order + 1}" for order in range(REORDERINGS) if NAMES[1] in config.baselines]
    if not names:
        return {}
    waiting = dist.new_group(timeout=datetime.timedelta(seconds=TIMEOUT_S)) if dist.is_initialized() else None
    found = {}
    if rank == 0:
        for name in names:
            logger.info("training %s", name)
            found[name] = train(config, name, folder / name)
    if waiting is not None:
        dist.barrier(waiting)
    return found


def train(config: Config, name: str, folder: Path) -> history.Points:
    """Train the control in a process of its own, which knows nothing of ranks.

    Args:
        config: Of the run it is a control of.
        name: `one_process`, or `one_process_reordered_<number>` with the sentences of every batch in other orders.
        folder: Where it writes; whatever is found there is continued.

    Returns:
        Steps and training losses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    argument: dict[str, object] = {"config": dataclasses.asdict(alone(config)), "folder": str(folder)}
    argument["order"] = None if name == NAMES[0] else name
    (found,) = run_ranks(
        f"{__name__}:train_here",
        argument,
        num_ranks=1,
        folder=folder,
        threads=threads.chosen(config),
        timeout_s=TIMEOUT_S,
    )
    return tuple(found["steps"]), tuple(found["losses"])


def alone(config: Config) -> Config:
    """The same training in one process: as many batches a step, accumulated instead of shared."""
    batches = config.trainer.accumulation_steps * config.cluster.num_ranks
    return dataclasses.replace(
        config,
        cluster=dataclasses.replace(config.cluster, num_ranks=1),
        moe=dataclasses.replace(config.moe, expert_ranks=1, pipeline=PipelineConfig()),
        trainer=dataclasses.replace(config.trainer, accumulation_steps=batches, deepspeed="off"),
        record=False,
    )


def train_here(rank: int, num_ranks: int, argument: dict[str, Any]) -> dict[str, Any]:
    """What the control's process does: train, and return the steps and losses."""
    for variable in [name for name in os.environ if name.startswith(LAUNCHERS)]:
        del os.environ[variable]  # or the library would wait for other ranks
    config, folder = build(Config, argument["config"]), Path(argument["folder"])
    torch.set_num_threads(threads.chosen(config))
    task = build_task(config, folder)
    if argument["order"] is not None:
        collate, generator = task.collate, torch.Generator().manual_seed(zlib.crc32(argument["order"].encode()))

        def reordered(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
            order = torch.randperm(len(examples), generator=generator).tolist()
            return collate([examples[position] for position in order])

        task.collate = reordered  # type: ignore[method-assign]
    model = build_model(config, task, moe=config.moe.enabled)
    trainer = QuartetTrainer(config, task, model, folder=folder, orthogonal=config.omoe.enabled and model.has_experts)
    checkpoint = checkpoints.newest(folder / "checkpoints")
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    steps, losses = history.read(trainer.state.log_history).points["loss"]
    return {"steps": steps, "losses": losses}


def summary(ranks: history.Points, controls: Mapping[str, history.Points]) -> dict[str, float]:
    """Largest differences of the loss over the first steps, under stable names."""
    found = {}
    if NAMES[0] in controls:
        found["loss_difference_max"] = difference(ranks, controls[NAMES[0]])
    if len(controls) > 1:
        pairs = itertools.combinations(controls.values(), 2)
        found["reordering_difference_max"] = max(difference(left, right) for left, right in pairs)
        if "loss_difference_max" in found and found["reordering_difference_max"] > 0:
            found["loss_difference_ratio"] = found["loss_difference_max"] / found["reordering_difference_max"]
    return found


def difference(left: history.Points, right: history.Points) -> float:
    """The largest difference of two losses that were logged at the same steps.

    Raises:
        ValueError: If they were not.
    """
    if left[0] != right[0]:
        raise ValueError(f"right: got losses of steps {right[0]}, accepts those of steps {left[0]}")
    return max(abs(a - b) for step, a, b in zip(left[0], left[1], right[1], strict=True) if step <= COMPARED_STEPS)


def rows(figures: Mapping[str, float]) -> tuple[Row, ...]:
    """The differences as rows."""
    units = {"loss_difference_ratio": "ratio"}
    return tuple(
        Row(provider="moe" if name != "reordering_difference_max" else NAMES[1], metric=name, value=value,
            unit=units.get(name, "nats"))
        for name, value in figures.items()
    )  # fmt: skip


def sections(ranks: history.Points, controls: Mapping[str, history.Points], num_ranks: int) -> tuple[Section, ...]:
    """The losses over each other, and how far each is from the control's."""
    if not controls:
        return ()
    curves = {f"{num_ranks} ranks": ranks, **{name.replace("_", " "): points for name, points in controls.items()}}
    pictures = [plots.curves(curves, title="Loss", x_label="step", y_label="nats")]
    first = controls.get(NAMES[0])
    if first is not None:
        apart = {
            name: (points[0], [abs(a - b) for a, b in zip(points[1], first[1], strict=True)])
            for name, points in curves.items()
            if points is not first
        }
        pictures.append(plots.curves(apart, title="Distance from one process", x_label="step", y_label="nats"))
    note = (
        f"One process trains on the batches of all {num_ranks} ranks; reordered, with the sentences of every batch in "
        "other orders. All are the same mathematics: what differs is the order in which float32 is summed."
    )
    return (Section(title="Ranks against one process", note=note, plots=tuple(pictures)),)
