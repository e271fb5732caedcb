"""Train and evaluate an experiment: python -m scripts.train experiment=<package>/<name> [resume=auto] [debug=smoke]."""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from configs.schema import Config
from moe_pipeline.parallel import gather_state
from scripts.testbed import checkpoints, chosen_plans, comparison, experts, history, launch, one_process, threads
from scripts.testbed.quartet import build as build_model
from scripts.testbed.report import Section, Table
from scripts.testbed.rows import Row
from scripts.testbed.study import study
from scripts.testbed.tasks.build import build as build_task
from scripts.testbed.tasks.task import Evaluation, Task
from scripts.testbed.trainer import QuartetTrainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One trained network and what is known of it."""

    evaluation: Evaluation
    rows: tuple[Row, ...]
    sections: tuple[Section, ...]
    summary: dict[str, float]
    losses: history.Points
    """Logged steps and training losses."""


def train(config: Config, run: launch.Run) -> launch.Outcome:
    """Train the experiment's network and its dense control, and evaluate both beside the baselines.

    Args:
        config: The run's configuration.
        run: Where to write.

    Returns:
        Rows, headline figures and the report's sections.
    """
    if config.study.tasks:
        return study.run(config, run)
    if config.comparison.enabled:
        return comparison.train(config, run)
    torch.set_num_threads(threads.chosen(config))
    task = build_task(config, run.folder)
    provider = "moe" if config.moe.enabled else "dense"
    main = fit(config, task, run.folder, provider=provider)
    baselines: list[Evaluation] = []
    for name in config.baselines:
        if name in one_process.NAMES:
            continue
        if name == "dense":
            if not config.moe.enabled:
                continue
            logger.info("training the dense control")
            baselines.append(fit(config, task, run.folder / "dense", provider="dense").evaluation)
        elif (evaluation := task.baseline(name)) is not None:
            baselines.append(evaluation)
    controls = one_process.train_all(config, run.folder, rank=run.rank)
    differences = one_process.summary(main.losses, controls)
    summary = {**main.evaluation.summary}
    for evaluation in baselines:
        summary |= evaluation.summary
    rows = (*main.evaluation.rows, *(row for baseline in baselines for row in baseline.rows), *main.rows)
    control_sections = one_process.sections(main.losses, controls, config.cluster.num_ranks)
    return launch.Outcome(
        rows=(*rows, *one_process.rows(differences)),
        summary={**summary, **main.summary, **differences},
        data_sha256=task.data_sha256,
        sections=(methods(config), *control_sections, *main.evaluation.sections, *main.sections),
    )


def fit(config: Config, task: Task, folder: Path, *, provider: str) -> Fit:
    """Train one network, or continue it from its newest whole checkpoint, and evaluate its best checkpoint.

    Args:
        config: The run's configuration.
        task: Data, network and figures.
        folder: Where checkpoints go; whatever is found there is continued.
        provider: `moe` upcycles the network, `dense` leaves it.
    """
    model = build_model(config, task, moe=provider == "moe")
    orthogonal = config.omoe.enabled and model.has_experts
    trainer = QuartetTrainer(config, task, model, folder=folder, orthogonal=orthogonal)
    start = experts.measure(model, task)
    checkpoint = checkpoints.newest(folder / "checkpoints")
    if checkpoint is not None:
        logger.info("continuing from %s", checkpoint)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if trainer.interrupted:
        sys.exit(f"stopped at step {trainer.state.global_step}; continue with: resume=auto")
    curves = history.read(trainer.state.log_history)
    evaluation = task.evaluate(trainer, provider)
    measures = experts.measure(model, task)
    whole = gather_state(model.network)  # spread experts need every rank
    model.network.save_pretrained(folder / "model", state_dict=whole, is_main_process=trainer.is_world_process_zero())
    return Fit(
        evaluation=evaluation,
        rows=(*history.rows(curves, provider), *experts.rows(measures, provider)),
        sections=(
            *history.sections(curves),
            *experts.sections(start, measures),
            *chosen_plans.sections(model.network),
        ),
        summary={**history.summary(curves), **experts.summary(measures)},
        losses=curves.points.get("loss", ((), ())),
    )


def methods(config: Config) -> Section:
    """Which of the four took part, in words."""
    gate = config.moe.gate
    used = {
        "moe_pipeline": f"{gate.num_experts} experts, {gate.kind} routing, top {gate.top_k}{_spread(config)}"
        if config.moe.enabled
        else "off",
        "fusion": "attention and experts as chains: torch's until a kernel is found that pays, which is looked for "
        f"once {config.fusion.patience_flops:,.0f} operations of a size have been computed"
        if config.fusion.enabled
        else "off",
        "omoe": _omoe(config),
        "bliss": f"mode {config.bliss.mode}, weight {config.bliss.weight}" if config.bliss.enabled else "off",
    }
    return Section(
        title="Methods",
        note="Each is switched off by one word: moe=off, fusion=off, omoe=off, bliss=off.",
        table=Table(headers=("Package", "In this run"), rows=tuple(used.items())),
    )


def _spread(config: Config) -> str:
    ranks, chunks = config.moe.expert_ranks, config.moe.pipeline.num_chunks
    count = "as many chunks as each layer finds best" if chunks == "auto" else f"{chunks} chunks"
    return "" if ranks == 1 else f", spread over {ranks} ranks, in {count}"


def _omoe(config: Config) -> str:
    if not config.omoe.enabled:
        return "off"
    if not config.moe.enabled:
        return "on, but without experts it has nothing to act on"
    return f"space {config.omoe.space}, an orthogonal step every {config.omoe.period}"


if __name__ == "__main__":
    launch.main("train", train)
