"""Ranks that agree exchange rows; ranks that do not, or that stay away or die, are named on every rank that lives.

A test of a rank that dies starts its own processes and reads their reports from pipes, with a limit after which it
fails; what it kills in the end is what it started.
"""

import multiprocessing
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from datetime import timedelta
from multiprocessing.connection import Connection

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor, nn

from moe_pipeline import FeedForwardExperts, Gate, GateConfig, ModuleExperts, MoELayer, PipelineConfig
from moe_pipeline.run.comm import MIN_COUNTS, Agreement, Call, Place, RankError, exchange_rows
from moe_pipeline.run.ranks import ExpertRanks, expert_ranks

CPU = torch.device("cpu")
GROUP_TIMEOUT = timedelta(seconds=120)  # far beyond HARD_LIMIT_S: an error in time is the package's, not the group's
HARD_LIMIT_S = 60.0  # of waiting for a report; reached only where something hangs
WIDTH = 6
Report = Callable[[], str]


def _rank_main(
    rank: int, num_ranks: int, store: str, pipe: Connection, function: Callable[..., str], arguments: tuple[object, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    init = f"file://{store}"
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=num_ranks, timeout=GROUP_TIMEOUT)
    try:
        pipe.send(function(rank, num_ranks, *arguments))
    except RankError as error:
        pipe.send(f"RankError: {error}")
    except Exception as error:  # whatever it is, the test shows it
        pipe.send(f"{type(error).__name__}: {error}")
    pipe.poll(HARD_LIMIT_S)  # a rank that is done stays, so that nobody takes it for dead
    os._exit(0)


@contextmanager
def _ranks_apart(num_ranks: int, function: Callable[..., str], *arguments: object) -> Iterator[list[Report]]:
    """Processes that may end as they like; yields what waits for the report of each."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(num_ranks):
            ours, theirs = spawn.Pipe()
            store = os.path.join(folder, "store")
            process = spawn.Process(target=_rank_main, args=(rank, num_ranks, store, theirs, function, arguments))
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)

        def report(rank: int) -> str:
            assert pipes[rank].poll(HARD_LIMIT_S), f"rank {rank} says nothing for {HARD_LIMIT_S:g} s"
            try:
                return str(pipes[rank].recv())
            except EOFError:
                return "ended"

        try:
            yield [lambda rank=rank: report(rank) for rank in range(num_ranks)]  # type: ignore[misc]
        finally:
            for process in processes:
                process.kill()
                process.join()


def _reports(num_ranks: int, function: Callable[..., str], *arguments: object) -> list[str]:
    with _ranks_apart(num_ranks, function, *arguments) as reports:
        return [report() for report in reports]


# Messages


def _check_messages(rank: int, num_ranks: int) -> None:
    ranks = expert_ranks()
    place = Place("moe", False, 0, 1, "dispatch")
    rows = [
        [3 * source + other for other in range(num_ranks)] for source in range(num_ranks)
    ]  # ragged, 0 to itself once
    sent_RM = torch.cat([torch.full((rows[rank][other], 2), 10.0 * rank + other) for other in range(num_ranks)])
    received = [rows[source][rank] for source in range(num_ranks)]
    out_RM = torch.full((sum(received), 2), torch.nan)
    over = threading.Event()
    message = exchange_rows(out_RM, sent_RM, received=received, sent=rows[rank], ranks=ranks, place=place, timeout_s=30)
    message.on_done(lambda future: over.set())
    message.wait()
    message.wait()  # once more does nothing
    message.on_done(lambda future: over.clear())  # nor does asking afterwards
    expected = [torch.full((rows[source][rank], 2), 10.0 * source + rank) for source in range(num_ranks)]
    assert torch.equal(out_RM, torch.cat(expected))
    assert over.wait(30)


# Agreement

BASE = Call(
    layer="encoder.2", backward=False, num_experts=4, d_model=6, dtype="torch.float32", num_chunks=3, restore="S1",
    split="tokens", overlap=True, differentiable=True,
)  # fmt: skip
OTHER: dict[str, object] = {
    "layer": "encoder.3",
    "backward": True,
    "num_experts": 8,
    "d_model": 7,
    "dtype": "torch.bfloat16",
    "num_chunks": 2,
    "restore": "S4",
    "split": "local",
    "overlap": False,
    "differentiable": False,
}


def _agree(call: Call, ranks: ExpertRanks, *, rows: int = 1, timeout_s: float = 30) -> tuple[tuple[int, ...], ...]:
    counts = [
        [rows + 10 * other + expert for expert in range(call.num_experts // ranks.size)] for other in range(ranks.size)
    ]
    return Agreement(call, counts, ranks=ranks, device=CPU, timeout_s=timeout_s).counts()


def _check_agreement(rank: int, num_ranks: int) -> None:
    ranks, odd = expert_ranks(), num_ranks - 1
    for name, value in OTHER.items():
        call = replace(BASE, **{name: value}) if rank == odd else BASE  # type: ignore[arg-type]
        with pytest.raises(RankError) as caught:
            _agree(call, ranks)
        text, other = str(caught.value), 0 if rank == odd else odd
        direction = "backward" if call.backward else "forward"
        where = (
            f"rank {rank} of {num_ranks}, layer {call.layer!r}, {direction}, chunk 1 of {call.num_chunks}, stage counts"
        )
        assert text.startswith(f"{where}: rank {other} calls with something else: {name}="), text
        here, there = (value, getattr(BASE, name)) if rank == odd else (getattr(BASE, name), value)
        if isinstance(value, str):  # text travels as a number; what it is over there, the other rank's own error says
            assert f"{name}={here!r} here and another there" in text
        else:
            assert f"{name}={int(here)} here and {int(there)} there" in text
        assert text.count(" here and ") == 1, text
        received = _agree(BASE, ranks, rows=100 * rank)  # nothing was lost or left over
        local = BASE.num_experts // num_ranks
        assert received == tuple(
            tuple(100 * source + 10 * rank + expert for expert in range(local)) for source in range(num_ranks)
        )


def _check_many(rank: int, num_ranks: int) -> None:
    ranks = expert_ranks()
    for local in (1, MIN_COUNTS, MIN_COUNTS + 1):
        received = _agree(replace(BASE, num_experts=num_ranks * local), ranks, rows=1000 * rank)
        assert received == tuple(
            tuple(1000 * source + 10 * rank + expert for expert in range(local)) for source in range(num_ranks)
        )
    nothing = Agreement(BASE, (), ranks=ranks, device=CPU, timeout_s=30).counts()  # agreement alone, as in backward
    assert nothing == ((),) * num_ranks


def _check_talk(rank: int, num_ranks: int) -> None:
    _check_messages(rank, num_ranks)
    _check_agreement(rank, num_ranks)
    _check_many(rank, num_ranks)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_rows_and_counts_travel_and_every_setting_that_differs_is_named_on_every_rank(num_ranks: int) -> None:
    assert set(OTHER) == {field.name for field in fields(Call)}, "a field is not tested"
    run_ranks(num_ranks, _check_talk)


def test_a_place_says_where_it_is() -> None:
    assert str(Place("moe", True, 1, 4, "combine_grad")) == "layer 'moe', backward, chunk 2 of 4, stage combine_grad"


# Ranks that stay away or die


def _stay_away(rank: int, num_ranks: int, where: str) -> str:
    ranks = expert_ranks()
    if where == "counts":
        return str(_agree(BASE, ranks, timeout_s=2)) if rank == 0 else "away"
    _agree(BASE, ranks)
    if rank != 0:
        return "away"
    place, rows_RM = Place("encoder.2", True, 1, 3, "resend"), torch.zeros(num_ranks, 2)
    ones = [1] * num_ranks
    exchange_rows(rows_RM.clone(), rows_RM, received=ones, sent=ones, ranks=ranks, place=place, timeout_s=2).wait()
    return "no error"


@pytest.mark.parametrize(
    ("where", "place"),
    [("counts", "forward, chunk 1 of 3, stage counts"), ("rows", "backward, chunk 2 of 3, stage resend")],
)
def test_a_rank_that_never_calls_is_waited_for_no_longer_than_was_said(where: str, place: str) -> None:
    waiting, away = _reports(2, _stay_away, where)
    assert away == "away"
    assert waiting.startswith(
        f"RankError: rank 0 of 2, layer 'encoder.2', {place}: no answer from all of ranks [1] within 2 s; one of them "
        "is stuck, stopped or elsewhere in its program"
    )


def _die(rank: int, num_ranks: int) -> str:
    ranks = expert_ranks()
    _agree(BASE, ranks)
    if rank == 1:
        os._exit(1)
    place, rows_RM = Place("encoder.2", False, 2, 3, "dispatch"), torch.zeros(num_ranks, 2)
    ones = [1] * num_ranks
    exchange_rows(rows_RM.clone(), rows_RM, received=ones, sent=ones, ranks=ranks, place=place, timeout_s=100).wait()
    return "no error"


def test_a_rank_that_dies_is_noticed_long_before_the_time_is_over() -> None:
    survivor, dead = _reports(2, _die)
    assert dead == "ended"
    place = "RankError: rank 0 of 2, layer 'encoder.2', forward, chunk 3 of 3, stage dispatch: "
    assert re.match(
        re.escape(place) + r"the exchange with ranks \[1\] broke off after .* s; one of them has ended", survivor
    )


# The same for a whole layer


class _Exits(nn.Module):
    """An expert whose rank dies while it computes."""

    def __init__(self, *, backward: bool) -> None:
        super().__init__()
        self.linear, self.backward = nn.Linear(WIDTH, WIDTH), backward

    def forward(self, rows_RM: Tensor) -> Tensor:
        out_RM = self.linear(rows_RM)
        if not self.backward:
            os._exit(1)
        out_RM.register_hook(lambda grad: os._exit(1))
        return out_RM


def _layer(ranks: ExpertRanks, *, width: int = WIDTH, num_chunks: int = 2, timeout_s: float = 100) -> MoELayer:
    torch.manual_seed(1)
    gate = Gate(GateConfig(num_experts=2 * ranks.size), width)
    experts = FeedForwardExperts(2, width, 8)
    config = PipelineConfig(num_chunks=num_chunks, timeout_s=timeout_s)
    return MoELayer(gate, experts, pipeline=config, ranks=ranks, name="middle")


def _step(layer: MoELayer, x_TM: Tensor, how: str) -> None:
    with torch.set_grad_enabled(how != "no_grad"):
        y_TM, _ = layer(x_TM)
    if how == "skips backward":
        layer(x_TM)
    y_TM.sum().backward()


def _disagree(rank: int, num_ranks: int) -> str:
    """In each way, the last rank does something else; every rank says what it is told, and goes on."""
    ranks, odd = expert_ranks(), rank == num_ranks - 1
    told = []
    for how in DISAGREEMENTS:
        width = WIDTH + 1 if odd and how == "width" else WIDTH
        layer = _layer(ranks, width=width, num_chunks=3 if odd and how == "chunks" else 2)
        x_TM = torch.randn(5 + 3 * rank, width)
        if odd and how == "dtype":
            layer, x_TM = layer.double(), x_TM.double()
        with pytest.raises(RankError) as caught:
            _step(layer, x_TM, how if odd else "")
        told.append(str(caught.value))
    _layer(ranks)(torch.randn(5 + 3 * rank, WIDTH))[0].sum().backward()  # all as it should be
    return "\n".join([*told, "went on"])


DISAGREEMENTS = {
    "width": ("forward", "forward", ["d_model=6 here and 7 there", "d_model=7 here and 6 there"]),
    "dtype": ("forward", "forward", ["dtype='torch.float32' here", "dtype='torch.float64' here"]),
    "chunks": ("forward", "forward", ["num_chunks=2 here and 3 there", "num_chunks=3 here and 2 there"]),
    "no_grad": ("forward", "forward", ["differentiable=1 here and 0 there", "differentiable=0 here and 1 there"]),
    "skips backward": ("backward", "forward", ["backward=1 here and 0 there", "backward=0 here and 1 there"]),
}


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_rank_that_does_something_else_is_named_on_every_rank_and_all_can_go_on(num_ranks: int) -> None:
    for rank, report in enumerate(_reports(num_ranks, _disagree)):
        odd = rank == num_ranks - 1
        other = 0 if odd else num_ranks - 1
        *told, end = report.split("\n")
        assert (end, len(told)) == ("went on", len(DISAGREEMENTS)), report
        for text, (*directions, details) in zip(told, DISAGREEMENTS.values(), strict=True):
            assert text.startswith(f"rank {rank} of {num_ranks}, layer 'middle', {directions[odd]}, chunk 1 of "), text
            assert f"stage counts: rank {other} calls with something else: " in text
            assert details[odd] in text


def _skip_the_layer(rank: int, num_ranks: int) -> str:
    ranks = expert_ranks()
    layer = _layer(ranks, timeout_s=2)
    y_TM, _ = layer(torch.randn(5, WIDTH))
    if rank == 1:
        return "away"
    y_TM.sum().backward()
    return "no error"


def test_a_rank_that_leaves_after_forward_is_waited_for_no_longer_than_was_said() -> None:
    waiting, _ = _reports(2, _skip_the_layer)
    assert waiting.startswith(
        "RankError: rank 0 of 2, layer 'middle', backward, chunk 1 of 2, stage counts: no answer from all of ranks [1] "
        "within 2 s"
    )


def _die_inside(rank: int, num_ranks: int, backward: bool) -> str:
    ranks = expert_ranks()
    torch.manual_seed(1)
    gate = Gate(GateConfig(num_experts=num_ranks), WIDTH)
    expert = _Exits(backward=backward) if rank == num_ranks - 1 else nn.Linear(WIDTH, WIDTH)
    config = PipelineConfig(num_chunks=2, timeout_s=100)
    layer = MoELayer(gate, ModuleExperts([expert]), pipeline=config, ranks=ranks, name="middle")
    layer(torch.randn(5, WIDTH))[0].sum().backward()
    return "no error"


@pytest.mark.parametrize(("num_ranks", "backward"), [(2, False), (2, True), (4, False)])
def test_a_rank_that_dies_between_its_messages_is_noticed_by_all_others(num_ranks: int, backward: bool) -> None:
    *survivors, dead = _reports(num_ranks, _die_inside, backward)
    assert dead == "ended"
    direction, stages = ("backward", "dispatch_grad|combine_grad") if backward else ("forward", "dispatch|combine")
    for rank, survivor in enumerate(survivors):
        place = (
            rf"RankError: rank {rank} of {num_ranks}, layer 'middle', {direction}, chunk [12] of 2, stage ({stages}): "
        )
        assert re.match(place + r"the exchange with ranks .* broke off after .* s; one of them has ended", survivor)
