"""What is recorded of real steps, and when a message counts as over."""

import threading
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from ranks import run_ranks
from torch import nn

from moe_pipeline import FeedForwardExperts, Gate, GateConfig, MoELayer, PipelineConfig
from moe_pipeline.dispatch import local_part
from moe_pipeline.layer import recorded
from moe_pipeline.plan.call import plan_call
from moe_pipeline.plan.partition import partition
from moe_pipeline.plan.schedule import Op, Schedule
from moe_pipeline.run import recorder as recorder_module
from moe_pipeline.run.comm import Message
from moe_pipeline.run.ranks import expert_ranks
from moe_pipeline.run.recorder import Recorder

WIDTH = 6


class _Late(Message):
    """A message that is over when the test says so."""

    def __init__(self) -> None:
        self.callbacks: list[Callable[[object], None]] = []

    def on_done(self, callback: Callable[[object], None]) -> None:  # type: ignore[override]
        self.callbacks.append(callback)


def test_a_message_ends_when_it_is_over_not_when_it_is_issued() -> None:
    recorder, message = Recorder(), _Late()
    recorder.enter("encoder", backward=False)
    assert recorder.run(Op("dispatch", 0), lambda chunk: message) is message
    recorder.enter("decoder", backward=True)
    assert recorder.run(Op("dgrad", 1), lambda chunk: None) is None
    thread = threading.Thread(target=message.callbacks[0], args=(None,))
    thread.start()
    first, second = recorder.timeline().spans
    thread.join()
    assert [str(span.op) for span in (first, second)] == ["dispatch1", "dgrad2"]
    assert (first.layer, first.backward, second.layer, second.backward) == ("encoder", False, "decoder", True)
    assert first.start_us <= second.start_us <= second.stop_us <= first.stop_us


def test_a_message_that_is_never_over_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder_module, "CALLBACK_TIMEOUT_S", 0.01)
    recorder = Recorder()
    recorder.run(Op("dispatch", 0), lambda chunk: _Late())
    with pytest.raises(TimeoutError, match=r"timeline: 1 messages are not over after 0\.01 s"):
        recorder.timeline()


def _gate() -> Gate:
    torch.manual_seed(2)
    return Gate(GateConfig(num_experts=4), WIDTH)


def _expected(layer: MoELayer, num_ranks: int) -> tuple[Schedule, Schedule]:
    counts = ((1,) * (4 // num_ranks),) * num_ranks
    plan = plan_call("moe", layer.pipeline, partition(counts, counts, num_chunks=layer.pipeline.num_chunks))
    return plan.forward, plan.backward


def _check_step(rank: int, num_ranks: int) -> None:
    ranks = expert_ranks() if num_ranks > 1 else None
    for restore in ("none", "S1", "S4"):
        torch.manual_seed(1)
        experts: nn.Module = FeedForwardExperts(4, WIDTH, 10)
        if ranks is not None:
            experts = local_part(experts, ranks)
        config = PipelineConfig(num_chunks=3, restore=restore)  # type: ignore[arg-type]
        layer = MoELayer(_gate(), experts, pipeline=config, ranks=ranks, name="third")
        x_TM = torch.randn(9 + rank, WIDTH)
        layer(x_TM)[0].sum().backward()  # before anybody listens
        with recorded(layer) as recorder:
            layer(x_TM)[0].sum().backward()
        layer(x_TM)[0].sum().backward()  # and after
        spans = recorder.timeline().spans
        assert {span.layer for span in spans} == {"third"}
        for backward, schedule in zip((False, True), _expected(layer, num_ranks), strict=True):
            seen = [span for span in spans if span.backward == backward]
            assert sorted(str(span.op) for span in seen) == sorted(str(op) for op in schedule.ops)
            for stream in ("compute", "comm", "copy"):  # each stream in its own order
                order = [str(span.op) for span in seen if span.stream == stream]
                assert order == [str(op) for op in schedule.stream(stream)]  # type: ignore[arg-type]
        assert all(span.start_us <= span.stop_us for span in spans)
        for stream in ("compute", "copy"):
            alone = sorted((span.start_us, span.stop_us) for span in spans if span.stream == stream)
            assert all(one[1] <= other[0] for one, other in pairwise(alone)), stream
        if num_ranks == 1:
            assert recorder.timeline().exposed_us == 0


def test_a_recorded_step_has_every_operation_of_the_schedule() -> None:
    _check_step(0, 1)


def test_a_recorded_step_of_two_ranks_has_every_operation_of_the_schedule() -> None:
    run_ranks(2, _check_step)


def test_recording_is_off_unless_asked_for_and_ends_with_its_block() -> None:
    model = nn.Sequential(MoELayer(_gate(), FeedForwardExperts(4, WIDTH, 10)))
    layer = model[0]
    assert layer.recorder is None
    with recorded(model) as recorder:
        assert layer.recorder is recorder
    with pytest.raises(RuntimeError, match="inside"), recorded(model):
        raise RuntimeError("inside")
    assert layer.recorder is None
    layer(torch.randn(5, WIDTH))
    assert recorder.timeline().spans == ()
    with recorded(model) as outer:
        with recorded(model) as inner:
            layer(torch.randn(5, WIDTH))
        layer(torch.randn(5, WIDTH))
    names = [str(span.op) for span in inner.timeline().spans]
    assert names == [str(span.op) for span in outer.timeline().spans] == ["gather1", "up1", "down1", "sum1"]


def test_recording_a_model_without_moe_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="model: Linear contains no MoELayer"), recorded(nn.Linear(2, 2)):
        pass
