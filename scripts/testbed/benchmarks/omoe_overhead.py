"""What OMoE adds to a training step: time beside AdamW, state, and how exact projectors of low rank are.

Every provider steps one network after the same forward and backward. A timed call of the input space is a cycle of four
steps, so that one orthogonal step is in each. The base optimizer is AdamW's fused form, the fastest here.

O: outputs and I: inputs of a linear map
"""

import dataclasses
import logging
from functools import partial

import torch
from torch import Tensor, nn

import omoe
from configs.schema import Config
from omoe import ExpertLinear, OMoE, OMoEConfig
from omoe.input_space import removed
from omoe.spread import ExpertGroup
from scripts.testbed import launch, plots, threads
from scripts.testbed.batches import TokenBatches
from scripts.testbed.precision import resolve
from scripts.testbed.quartet import QuartetModel
from scripts.testbed.quartet import build as build_model
from scripts.testbed.report import Section, Table
from scripts.testbed.rows import Row
from scripts.testbed.tasks.build import build as build_task
from scripts.testbed.tasks.task import Task
from scripts.testbed.timing import Timing, compare

logger = logging.getLogger(__name__)

BASE, DEFAULT, LOW_RANK, EXACT = "adamw", "omoe", "omoe_low_rank", "omoe_exact"
PERIOD, RANK = 4, 48
CONFIGS = {
    DEFAULT: OMoEConfig(space="update"),
    LOW_RANK: OMoEConfig(space="input", period=PERIOD, rank=RANK),
    EXACT: OMoEConfig(space="input", period=PERIOD),
}
TIMED = (DEFAULT, LOW_RANK)
STEPS = {BASE: 1, DEFAULT: 1, LOW_RANK: PERIOD}
"""Of a timed call."""
ERROR_STEPS = 90
"""Steps after which low rank is compared with exact: columns have been dropped several times by then."""
ERROR_TOKENS = 256
LEARNING_RATE = 1e-4


def bench(config: Config, run: launch.Run) -> launch.Outcome:
    """Time steps, count bytes, and compare low rank with exact on a real fine-tuning.

    Args:
        config: The run's configuration.
        run: Where to write.
    """
    torch.set_num_threads(threads.chosen(config))
    task = build_task(config, run.folder)
    timings = _timed(config, task)
    logger.info("timed: %s", {name: f"{timing.ratio:.3f}" for name, timing in timings.items()})
    errors = _errors(config, task)
    bert = {name: omoe.cost(bert_base(), chosen).state_bytes for name, chosen in CONFIGS.items()}
    rows = [*_time_rows(timings), *_cost_rows(config, task, bert)]
    rows += [
        Row(provider=LOW_RANK, metric=f"removed_component_error_{name}", unit="ratio", value=error)
        for name, error in errors.items()
    ]
    return launch.Outcome(
        rows=tuple(rows),
        summary={
            **{f"step_time_ratio_{name}": timings[name].ratio for name in TIMED},
            "step_time_ratio": max(timings[DEFAULT].ratio, timings[LOW_RANK].ratio),
            **{f"state_bytes_bert_base_{name}": value for name, value in bert.items()},
            "state_bytes_bert_base": max(bert[DEFAULT], bert[LOW_RANK]),
            "removed_component_error": max(errors.values()),
            "precision": resolve(config.trainer.precision, config.cluster.device),
        },
        data_sha256=task.data_sha256,
        sections=(_section(config, timings, bert, errors),),
    )


def bert_base(num_experts: int = 8, num_layers: int = 12) -> list[ExpertLinear]:
    """The experts' linears of BERT-base, without memory."""
    shapes = {"up": (3072, 768), "down": (768, 3072)}
    return [
        ExpertLinear(
            name=f"{layer}.experts.{name}",
            parameters=(nn.Parameter(torch.empty(num_experts, *shape, device="meta")),),
            modules=(),
        )
        for layer in range(num_layers)
        for name, shape in shapes.items()
    ]


def _timed(config: Config, task: Task) -> dict[str, Timing]:
    model = build_model(config, task, moe=True).train()
    batch = _batch(task, config.bench.num_tokens)
    bf16 = resolve(config.trainer.precision, config.cluster.device) == "bf16"
    calls = {
        name: partial(_steps, model, batch, optimizer, bf16=bf16, count=STEPS[name])
        for name, optimizer in {BASE: _adamw(model), **{n: _omoe(model, CONFIGS[n]) for n in TIMED}}.items()
    }
    timings = compare(calls, repeats=config.bench.repeats, warmup=config.bench.warmup)
    return {name: _of_a_step(timing, STEPS[name]) for name, timing in timings.items()}


def _of_a_step(timing: Timing, count: int) -> Timing:
    return Timing(
        median_us=timing.median_us / count,
        low_us=timing.low_us / count,
        high_us=timing.high_us / count,
        ratio=timing.ratio / count,
    )


def _steps(
    model: QuartetModel, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer, *, bf16: bool, count: int
) -> None:
    for _ in range(count):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(**batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _errors(config: Config, task: Task) -> dict[str, float]:
    """Per linear: the length of what low rank takes out of a real step less what the exact form does, relative."""
    model = build_model(config, task, moe=True).train()
    base = _adamw(model)
    forms = {name: _observer(model, CONFIGS[name]) for name in (EXACT, LOW_RANK)}
    rows = TokenBatches(
        [len(row["input_ids"]) for row in task.splits.train],
        batch_tokens=min(ERROR_TOKENS, config.bench.num_tokens),
        num_batches=6 if config.smoke else ERROR_STEPS,
        seed=config.seed,
    )
    before: dict[str, Tensor] = {}
    for batch in rows:
        examples = task.collate([task.splits.train[row] for _, row in batch])
        loss = model(**examples)["loss"]
        for optimizer in (base, *forms.values()):
            optimizer.zero_grad()
        loss.backward()
        for form in forms.values():
            form.step()
        before = {linear.name: linear.parameters[0].detach().clone() for linear in forms[EXACT].expert_linears}
        base.step()
    found: dict[str, float] = {}
    for linear in forms[EXACT].expert_linears:
        step_EOI = linear.parameters[0].detach() - before[linear.name]
        taken = {
            name: removed(step_EOI, form.linear_state[linear.name], form.config, ranks=ExpertGroup())
            for name, form in forms.items()
        }
        kind = linear.name.rpartition(".")[2]
        error = float((taken[LOW_RANK] - taken[EXACT]).norm() / taken[EXACT].norm())
        found[kind] = max(found.get(kind, 0.0), error)
    return found


def _observer(model: QuartetModel, config: OMoEConfig) -> OMoE:
    """OMoE whose steps move nothing and whose projectors see what the model's experts see."""
    linears = omoe.find_expert_linears(model)
    parameters = [parameter for linear in linears for parameter in linear.parameters]
    still = torch.optim.SGD(parameters, lr=0.0)
    return OMoE(still, linears, dataclasses.replace(config, period=10**9))


def _adamw(model: QuartetModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)


def _omoe(model: QuartetModel, config: OMoEConfig) -> OMoE:
    return OMoE(_adamw(model), omoe.find_expert_linears(model), config)


def _batch(task: Task, num_tokens: int) -> dict[str, Tensor]:
    """So many tokens of the longest training sentences, without padding but for a few."""
    longest = sorted(task.splits.train, key=lambda row: -len(row["input_ids"]))
    chosen, total = [], 0
    for row in longest:
        if total >= num_tokens:
            break
        chosen.append(row)
        total += len(row["input_ids"])
    return task.collate(chosen)


def _time_rows(timings: dict[str, Timing]) -> list[Row]:
    rows = []
    for name, timing in timings.items():
        rows += [
            Row(provider=name, metric="step_time", unit="us", value=timing.median_us, low=timing.low_us,
                high=timing.high_us),
            Row(provider=name, metric="step_time_ratio", unit="x adamw", value=timing.ratio),
        ]  # fmt: skip
    return rows


def _cost_rows(config: Config, task: Task, bert: dict[str, int]) -> list[Row]:
    linears = omoe.find_expert_linears(build_model(config, task, moe=True))
    rows = []
    for name, chosen in CONFIGS.items():
        taken = omoe.cost(linears, chosen)
        rows += [
            Row(provider=name, metric="state_bytes", unit="bytes", value=float(taken.state_bytes)),
            Row(provider=name, metric="scratch_bytes", unit="bytes", value=float(taken.scratch_bytes)),
            Row(provider=name, metric="state_bytes_bert_base", unit="bytes", value=float(bert[name])),
        ]
    return rows


def _section(config: Config, timings: dict[str, Timing], bert: dict[str, int], errors: dict[str, float]) -> Section:
    lines = tuple(
        (
            name,
            f"{timing.median_us / 1e3:.0f} ms",
            f"{timing.ratio:.3f} x",
            f"{bert[name] / 1e6:.0f} MB" if name in bert else "-",
        )
        for name, timing in timings.items()
    )
    shown = ", ".join(f"{value:.4f} ({name})" for name, value in errors.items())
    layers = ", ".join(config.moe.layers)
    return Section(
        title="A training step",
        note=f"{config.bench.num_tokens} tokens, {config.moe.gate.num_experts} experts in {layers}, "
        f"{resolve(config.trainer.precision, config.cluster.device)}, {torch.get_num_threads()} thread(s); medians of "
        f"{config.bench.repeats} alternated rounds. Low rank keeps {RANK} columns; what it takes out of a step differs "
        f"from the exact form's by {shown} of its length.",
        plots=(
            plots.bars(
                {name: [timing.median_us / 1e3] for name, timing in timings.items()},
                title="Time of a step",
                x_label="",
                y_label="ms",
            ),
        ),
        table=Table(headers=("Optimizer", "Step", "Against AdamW", "State for BERT-base, 8 experts"), rows=lines),
    )
