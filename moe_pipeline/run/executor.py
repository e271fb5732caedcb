"""Executor: carries a schedule out.

On a CPU messages run beside the one thread that computes; on a GPU every stream of the schedule is a CUDA stream and
every wait an event.
"""

from collections.abc import Callable, Mapping

import torch

from moe_pipeline.plan.schedule import Schedule, Stage
from moe_pipeline.run.buffers import Workspace
from moe_pipeline.run.comm import Message
from moe_pipeline.run.recorder import Recorder

Handler = Callable[[int], Message | None]


def execute(
    schedule: Schedule,
    handlers: Mapping[Stage, Handler],
    *,
    workspace: Workspace,
    device: torch.device,
    recorder: Recorder | None = None,
) -> None:
    """Run every operation after what it waits for.

    Args:
        schedule: The operations in the order they are issued.
        handlers: Stage -> what does it for a chunk; those that send return their message.
        workspace: Holds the CUDA streams.
        device: Where the layer computes.
        recorder: Notes when each operation ran; None costs nothing.

    Raises:
        RankError: If another rank failed or did not answer.

    Source: MPipeMoE (arXiv:2506.22175) section III-D.
    """
    if device.type == "cuda":
        _on_cuda_streams(schedule, handlers, workspace, device, recorder)
    else:
        _on_one_thread(schedule, handlers, recorder)


def _on_one_thread(schedule: Schedule, handlers: Mapping[Stage, Handler], recorder: Recorder | None) -> None:
    under_way: dict[int, Message] = {}
    for position, op in enumerate(schedule.ops):
        for wait in op.waits:
            if wait in under_way:
                under_way.pop(wait).wait()
        message = handlers[op.stage](op.chunk) if recorder is None else recorder.run(op, handlers[op.stage])
        if message is not None:
            under_way[position] = message
    for message in under_way.values():
        message.wait()


def _on_cuda_streams(
    schedule: Schedule,
    handlers: Mapping[Stage, Handler],
    workspace: Workspace,
    device: torch.device,
    recorder: Recorder | None,
) -> None:
    main = torch.cuda.current_stream(device)
    streams = {"compute": main, **workspace.streams(device)}
    for stream in streams.values():
        stream.wait_stream(main)
    awaited = {wait for op in schedule.ops for wait in op.waits}
    events: dict[int, torch.cuda.Event] = {}
    for position, op in enumerate(schedule.ops):
        stream = streams[op.stream]
        with torch.cuda.stream(stream):
            for wait in op.waits:
                stream.wait_event(events[wait])
            if recorder is None:
                handlers[op.stage](op.chunk)
            else:
                recorder.run_on_stream(op, handlers[op.stage], stream)
            if position in awaited:
                events[position] = stream.record_event()
    for stream in streams.values():
        main.wait_stream(stream)
