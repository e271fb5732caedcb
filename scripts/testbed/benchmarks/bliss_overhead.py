"""What each objective costs: a training step beside the plain one's, inference beside the plain network's."""

from collections.abc import Callable, Iterable, Mapping
from typing import get_args

import torch
from torch import Tensor

import bliss
from bliss.config import Mode
from configs.schema import Config
from scripts.testbed import launch, objectives, plots, threads
from scripts.testbed.batches import TokenBatches
from scripts.testbed.precision import resolve
from scripts.testbed.quartet import QuartetModel, vocabulary
from scripts.testbed.quartet import build as build_model
from scripts.testbed.quick_dropout import quick_dropout
from scripts.testbed.report import Section
from scripts.testbed.rows import Row
from scripts.testbed.tasks.build import build as build_task
from scripts.testbed.tasks.task import Task
from scripts.testbed.timing import Timing, compare

NUM_BATCHES = 2
NUM_GENERATED = 24
MAX_NEW_TOKENS = 16
SELF_SUPERVISED = "bliss_clean"
INFERENCE_ROUNDS = 3  # rounds of generation for one of training: it is short, and its ratio is asked for closely

Batch = Mapping[str, Tensor]


def bench(config: Config, run: launch.Run) -> launch.Outcome:
    """Time a step of every objective, the generator alone, and inference with and without what training adds.

    Args:
        config: The run's configuration.
        run: Where the tokenizer goes.
    """
    torch.set_num_threads(threads.chosen(config))
    torch.manual_seed(config.seed)
    task = build_task(config, run.folder)
    batches = _batches(config, task)
    models = {name: _model(config, task, name) for name in objectives.names()}
    steps = {name: _step(config, model, batches) for name, model in models.items()}
    generator = _generator(task, models[SELF_SUPERVISED], batches)
    with quick_dropout(enabled=config.cluster.device == "cpu"):
        peers = {**steps, "generator": generator}
        timings = compare(peers, repeats=config.bench.repeats, warmup=config.bench.warmup)
    two = {name: _inference(config, models[name], batches[0]) for name in ("plain", SELF_SUPERVISED)}
    inference = compare(two, repeats=INFERENCE_ROUNDS * config.bench.repeats, warmup=config.bench.warmup)
    modes = {f"bliss_{mode}": mode for mode in get_args(Mode)}
    summary = {f"step_time_ratio_{modes.get(name, name)}": timings[name].ratio for name in models}
    summary["inference_ratio"] = inference[SELF_SUPERVISED].ratio
    summary["generator_share"] = timings["generator"].ratio / timings[SELF_SUPERVISED].ratio
    headlines = (
        Row(provider="bliss", metric=name, unit="ratio", value=summary[name])
        for name in ("inference_ratio", "generator_share")
    )
    return launch.Outcome(
        rows=(*(row for name in models for row in _rows(name, timings[name])), *headlines),
        summary={**summary},
        data_sha256=task.data_sha256,
        sections=(_section(config, timings),),
    )


def _model(config: Config, task: Task, name: str) -> QuartetModel:
    model = build_model(objectives.with_objective(config, name), task, moe=False)
    return model.to(config.cluster.device).train()


def _batches(config: Config, task: Task) -> list[Batch]:
    """The first training batches, of different lengths where the data has them."""
    rows = task.splits.train
    lengths = [max(len(row["input_ids"]), len(row["labels"])) for row in rows]
    drawn = TokenBatches(lengths, batch_tokens=config.trainer.batch_tokens, num_batches=NUM_BATCHES, seed=config.seed)
    collated = (task.collate([{**rows[row], "epoch": epoch} for epoch, row in batch]) for batch in drawn)
    return [{name: value.to(config.cluster.device) for name, value in batch.items()} for batch in collated]


def _step(config: Config, model: QuartetModel, batches: Iterable[Batch]) -> Callable[[], object]:
    """Forward, backward and the optimizer's step on every batch."""
    trainer = config.trainer
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=trainer.weight_decay, fused=True)

    def run() -> None:
        for batch in batches:
            with _autocast(config):
                loss = model(**batch, step=trainer.max_steps)["loss"]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()

    return run


def _generator(task: Task, model: QuartetModel, batches: Iterable[Batch]) -> Callable[[], object]:
    words = vocabulary(task.tokenizer).to(model.network.device)

    def run() -> None:
        for batch in batches:
            bliss.perturb(
                batch["input_ids"],
                batch["attention_mask"],
                sentence_id_B=batch["sentence_id"],
                epoch=int(batch["epoch"]),
                seed=model.seed,
                vocabulary=words,
                config=model.objective,
            )

    return run


def _inference(config: Config, model: QuartetModel, batch: Batch) -> Callable[[], object]:
    """Greedy generation; the weights differ, so the number of tokens is fixed."""
    length = {"max_new_tokens": MAX_NEW_TOKENS, "min_new_tokens": MAX_NEW_TOKENS}

    def run() -> None:
        model.eval()
        ids_BS, mask_BS = (batch[name][:NUM_GENERATED] for name in ("input_ids", "attention_mask"))
        with _autocast(config):
            model.generate(ids_BS, mask_BS, num_beams=1, do_sample=False, **length)

    return run


def _autocast(config: Config) -> torch.autocast:
    bf16 = resolve(config.trainer.precision, config.cluster.device) == "bf16"
    return torch.autocast(config.cluster.device, torch.bfloat16, enabled=bf16)


def _rows(name: str, timing: Timing) -> tuple[Row, Row]:
    return (
        Row(
            provider=name, metric="step_time", unit="us", value=timing.median_us, low=timing.low_us, high=timing.high_us
        ),
        Row(provider=name, metric="step_time_ratio", unit="x plain", value=timing.ratio),
    )


def _section(config: Config, timings: dict[str, Timing]) -> Section:
    ratios = {name: [timing.ratio] for name, timing in timings.items()}
    return Section(
        title="A training step beside the plain one",
        note=f"{NUM_BATCHES} batches of at most {config.trainer.batch_tokens} padded tokens, forward, backward, step, "
        f"{torch.get_num_threads()} threads; medians of {config.bench.repeats} alternated rounds.",
        plots=(plots.bars(ratios, title="Step time", x_label="", y_label="x plain"),),
    )
