"""Operations run in the schedule's order, and a message is waited for when the first that needs it comes."""

import copy
from collections.abc import Callable
from itertools import product

import pytest
import torch
from closeness import assert_all_close

from moe_pipeline import FeedForwardExperts, Gate, GateConfig, MoELayer, PipelineConfig
from moe_pipeline.config import Restore
from moe_pipeline.layer import recorded
from moe_pipeline.plan.schedule import Op, Schedule, Stage, backward_schedule, forward_schedule
from moe_pipeline.plan.strategy import ring_depths, strategy
from moe_pipeline.run.buffers import Workspace
from moe_pipeline.run.comm import Message, RankError
from moe_pipeline.run.executor import execute
from moe_pipeline.run.recorder import Recorder

CPU = torch.device("cpu")


class _Fake(Message):
    """A message that notes in a log when it is waited for, and is over at once if somebody asks to be told."""

    def __init__(self, log: list[str], name: str, error: Exception | None = None) -> None:
        self._log, self._name, self._error = log, name, error

    def wait(self) -> None:
        self._log.append(f"wait {self._name}")
        if self._error is not None:
            raise self._error

    def on_done(self, callback: Callable[[object], None]) -> None:  # type: ignore[override]
        callback(None)


def _run(schedule: Schedule, *, recorder: Recorder | None = None, failing: str = "") -> list[str]:
    log: list[str] = []

    def handler(stage: Stage) -> Callable[[int], Message | None]:
        def handle(chunk: int) -> Message | None:
            op = Op(stage, chunk)
            log.append(str(op))
            if str(op) == failing:
                raise RankError(failing)
            error = RankError(failing) if failing == f"wait {op}" else None
            return _Fake(log, str(op), error) if op.stream == "comm" else None

        return handle

    handlers = {op.stage: handler(op.stage) for op in schedule.ops}
    try:
        execute(schedule, handlers, workspace=Workspace(), device=CPU, recorder=recorder)
    except RankError:
        log.append("raised")
    return log


SMALL = Schedule(
    (
        Op("gather", 0),
        Op("dispatch", 0, (0,)),
        Op("gather", 1),
        Op("dispatch", 1, (2,)),
        Op("up", 0, (1,)),
        Op("down", 0, (1,)),
        Op("combine", 0, (5,)),
        Op("up", 1, (3,)),
    )
)


def test_a_message_is_under_way_until_somebody_needs_it() -> None:
    expected = "gather1 dispatch1 gather2 dispatch2 wait dispatch1 up1 down1 combine1 wait dispatch2 up2 wait combine1"
    assert " ".join(_run(SMALL)) == expected


def test_recording_changes_nothing() -> None:
    assert _run(SMALL, recorder=Recorder()) == _run(SMALL)


def _schedules() -> list[Schedule]:
    chosen = [strategy(name) for name in ("none", "S1", "S2", "S3", "S4")]  # type: ignore[arg-type]
    builds = (forward_schedule, backward_schedule)
    return [
        build(num_chunks, one, ring_depths(one, num_chunks), exchanges=True, overlap=overlap)
        for num_chunks, one, overlap, build in product((1, 2, 5), chosen, (False, True), builds)
    ]


def test_every_schedule_runs_in_order_and_waits_no_sooner_than_it_must() -> None:
    for schedule in _schedules():
        log = _run(schedule)
        assert [entry for entry in log if not entry.startswith("wait")] == [str(op) for op in schedule.ops]
        for position, op in enumerate(schedule.ops):
            if op.stream != "comm":
                continue
            assert log.count(f"wait {op}") == 1
            dependent = next((str(later) for later in schedule.ops if position in later.waits), None)
            waited = log.index(f"wait {op}")
            following = next((entry for entry in log[waited:] if not entry.startswith("wait")), None)
            assert following == dependent, (op, log)


@pytest.mark.parametrize(
    ("failing", "log"),
    [
        ("gather1", "gather1 raised"),
        ("dispatch2", "gather1 dispatch1 gather2 dispatch2 raised"),
        ("wait dispatch1", "gather1 dispatch1 gather2 dispatch2 wait dispatch1 raised"),
    ],
)
def test_nothing_runs_after_an_error(failing: str, log: str) -> None:
    assert " ".join(_run(SMALL, failing=failing)) == log


@pytest.mark.gpu
@pytest.mark.parametrize("restore", ["none", "S1", "S2", "S3", "S4"])
@pytest.mark.parametrize("num_chunks", [1, 3])
def test_a_gpu_computes_what_a_cpu_does(restore: Restore, num_chunks: int) -> None:
    """Every stream of the schedule is a CUDA stream here; a missing wait shows as wrong numbers."""
    torch.manual_seed(0)
    gate = Gate(GateConfig(num_experts=3, top_k=2), 32)
    layer = MoELayer(gate, FeedForwardExperts(3, 32, 64, activation="silu", gated=True), pipeline=PipelineConfig())
    x_TM = torch.randn(257, 32)
    reference, truth = _step(layer, x_TM), _step(copy.deepcopy(layer).double(), x_TM.double())
    layer.pipeline = PipelineConfig(num_chunks=num_chunks, restore=restore)
    on_gpu = _step(copy.deepcopy(layer).cuda(), x_TM.cuda())
    assert_all_close({name: value.cpu() for name, value in on_gpu.items()}, reference, truth)


@pytest.mark.gpu
def test_a_gpu_records_every_operation_on_its_stream() -> None:
    gate = Gate(GateConfig(num_experts=3, top_k=1, normalize=False), 32)
    experts = FeedForwardExperts(3, 32, 64, activation="relu")
    layer = MoELayer(gate, experts, pipeline=PipelineConfig(num_chunks=4)).cuda()
    with recorded(layer) as recorder:
        _step(layer, torch.randn(64, 32, device="cuda"))
    spans = recorder.timeline().spans
    assert {str(span.op) for span in spans if not span.backward} >= {f"up{chunk}" for chunk in range(1, 5)}
    assert all(span.stop_us >= span.start_us for span in spans)


def _step(layer: MoELayer, x_TM: torch.Tensor) -> dict[str, torch.Tensor]:
    layer.zero_grad()
    x_TM = x_TM.clone().requires_grad_()
    y_TM, _ = layer(x_TM)
    y_TM.square().sum().backward()
    grads = {name: parameter.grad for name, parameter in layer.named_parameters() if parameter.grad is not None}
    return {"y": y_TM.detach(), "x": x_TM.grad, **grads}  # type: ignore[dict-item]
