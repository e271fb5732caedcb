"""One run of a comparison of training objectives: a method and a seed, trained, scored, and kept for the others.

config -> trained weights -> mean of the newest checkpoints -> texts -> scores, also under noise -> rows

A run that is recorded in scripts/results is not done again, and one that was stopped goes on where it was.
"""

import dataclasses
import hashlib
import json
import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch

from configs.comparison import ComparisonSection
from configs.schema import Config
from scripts.testbed import averaging, checkpoints, history, launch, probing, robustness, threads, verdicts
from scripts.testbed.files import write_text
from scripts.testbed.generation import texts_of
from scripts.testbed.quartet import QuartetModel
from scripts.testbed.quartet import build as build_model
from scripts.testbed.quick_dropout import quick_dropout
from scripts.testbed.report import Section, Table
from scripts.testbed.rows import Row
from scripts.testbed.tasks.build import build as build_task
from scripts.testbed.tasks.translation import Translation
from scripts.testbed.trainer import QuartetTrainer

logger = logging.getLogger(__name__)

RUNS = Path("outputs") / "comparison"
NUM_SHOWN = 10
SAME_TIME = 1.05  # a step that costs no more needs no shorter run for the same time


def train(config: Config, run: launch.Run) -> launch.Outcome:
    """Train and score one method with one seed, unless its rows are recorded already.

    Args:
        config: The run's configuration.
        run: Where to write the report; weights and checkpoints go to outputs/comparison.

    Returns:
        The run's rows; those on record where it is.
    """
    config = verdicts.budgeted(config)
    done = verdicts.recorded(config)
    if config.record and done:
        logger.info("%s, seed %d, is on record and is not trained again", config.comparison.method, config.seed)
        summary = {row.metric: row.value for row in done}
        return launch.Outcome(rows=tuple(done), summary={**summary}, on_record=True)
    torch.set_num_threads(threads.chosen(config))
    folder = home(config, run)
    task = build_task(config, folder)
    assert isinstance(task, Translation)
    model = build_model(config, task, moe=False)
    sections = fit(config, task, model, folder)
    return score(config, task, model, folder, sections)


def home(config: Config, run: launch.Run) -> Path:
    """The folder of a method, seed and all that training depends on, which experiments that only score it share.

    That of a shrunk run lies in the run's own folder.
    """
    rule = ComparisonSection(average_checkpoints=config.comparison.average_checkpoints)
    decisive = dataclasses.replace(config, name="", resume="off", record=False, baselines=(), comparison=rule)
    settings = dataclasses.asdict(decisive)
    del settings["comparison"]["errant"]  # a score, and younger than networks that were trained
    text = json.dumps(settings, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    name = f"{config.data.name}-{config.comparison.method}-{config.seed}-{digest}"
    return (run.folder if config.smoke else RUNS) / name


def fit(config: Config, task: Translation, model: QuartetModel, folder: Path) -> tuple[Section, ...]:
    """Train a model, or continue it, and leave the mean of its newest checkpoints in it and in the folder.

    Returns:
        The report's sections on training.
    """
    weights, log = folder / averaging.WEIGHTS, folder / "log.json"
    if not weights.exists():
        trainer = QuartetTrainer(config, task, model, folder=folder, orthogonal=False)
        newest = checkpoints.newest(folder / "checkpoints")
        if newest is not None:
            logger.info("continuing from %s", newest)
        with quick_dropout(enabled=config.cluster.device == "cpu"):
            trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
        if trainer.interrupted:
            sys.exit(f"stopped at step {trainer.state.global_step}; run the same command again to continue")
        write_text(log, json.dumps(trainer.state.log_history))
        mean = averaging.newest_weights(folder / "checkpoints", config.comparison.average_checkpoints)
        temporary = weights.with_suffix(".partial")
        safetensors.torch.save_file(mean, temporary)
        temporary.replace(weights)
        shutil.rmtree(folder / "checkpoints")
    model.load_state_dict(safetensors.torch.load_file(weights), strict=False)
    model.to(config.cluster.device)
    return history.sections(history.read(json.loads(log.read_text(encoding="utf-8"))))


def score(
    config: Config, task: Translation, model: QuartetModel, folder: Path, sections: tuple[Section, ...]
) -> launch.Outcome:
    """Score a trained model on both splits, on noisy test sources, and against the baseline's run of the same seed."""
    comparison, data = config.comparison, task.data
    name, unit = task.metric.name, task.metric.unit
    values: dict[str, tuple[float, str]] = {}

    def generated(sources: Sequence[str], beams: int) -> list[str]:
        return texts_of(model, task.tokenizer, sources, config=config, num_beams=beams)

    valid = generated(list(data.valid["source"]), config.trainer.num_beams)
    values[f"valid_{name}"] = task.metric(valid, task.references(data.valid), list(data.valid["source"])), unit
    sources = list(data.test["source"])
    test = generated(sources, config.trainer.num_beams)
    references = task.references(data.test)
    figures = task.metric.figures(test, references, sources)
    values |= {part: (value, unit) for part, value in task.metric.by_name(figures.sum(0)).items()}
    for metric in task.further:
        sums = metric.figures(test, references, sources).sum(0)
        values |= {part: (value, metric.unit) for part, value in metric.by_name(sums).items()}
    robust = robustness.measure(config, task, model, lambda texts: generated(texts, 1))
    against = verdicts.compare(config, task.metric, figures)
    if against is not None:
        values["p_value"] = against, "paired bootstrap"
    log = json.loads((folder / "log.json").read_text(encoding="utf-8"))
    values["train_cpu_seconds"] = max(entry.get("cpu_seconds", 0.0) for entry in log), "s"
    values["updates"] = float(config.trainer.max_steps), "count"
    values["parameters"] = float(sum(p.numel() for p in model.network.parameters())), "count"
    found = tuple(
        Row(provider=comparison.method, metric=metric, unit=own_unit, value=value)
        for metric, (value, own_unit) in values.items()
    )
    found += robust.rows + (probing.rows(config, task, model) if comparison.probes else ())
    found = tuple(dataclasses.replace(row, metric=row.metric + verdicts.suffix(config)) for row in found)
    ratio = verdicts.step_time_ratio(config)
    if config.comparison.budget == "updates" and ratio is not None and ratio <= SAME_TIME:
        found += (Row(provider=comparison.method, metric=f"{name}_equal_time", unit=unit, value=values[name][0]),)
    if comparison.method == comparison.baseline:  # what needs no training stands beside it once a seed
        found += tuple(row for each in config.baselines if (own := task.baseline(each)) for row in own.rows)
    triples = list(zip(sources, data.test["target"], test, strict=True))
    shown = tuple(triples[:: max(1, len(triples) // NUM_SHOWN)][:NUM_SHOWN])
    table = Table(headers=("Source", "Reference", comparison.method), rows=shown)
    return launch.Outcome(
        rows=found,
        summary={row.metric: row.value for row in found},
        data_sha256=task.data_sha256,
        sections=(*sections, *robust.sections, Section(title=f"Texts by {comparison.method}", table=table)),
    )
