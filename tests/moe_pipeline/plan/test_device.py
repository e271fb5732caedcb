"""What a device's figures mean, and that a file which cannot be used is refused with the field it fails at."""

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_equal_up_to_rounding
from hypothesis import given
from hypothesis import strategies as st

from moe_pipeline.plan import device as device_module
from moe_pipeline.plan.device import (
    Device,
    DeviceError,
    Speed,
    device_json,
    device_names,
    interference,
    load_device,
    parse_device,
)
from tests.moe_pipeline.machine import STREAMS, alphas, machine

LARGEST = 1e15
FINITE = st.floats(0, 1e9)
FACTORS = st.floats(0.01, 1)


@st.composite
def _speeds(draw: st.DrawFn) -> Speed:
    """Any speed a file may hold: the volumes and the times at its points grow."""
    steps = draw(st.lists(st.tuples(st.integers(1, 10**6), st.integers(1, 10**6)), min_size=1, max_size=5))
    volume, time_s, points = 0.0, 0.0, []
    for more, longer in steps:
        volume, time_s = volume + more, time_s + longer
        points.append((volume, volume / time_s))
    return Speed(draw(FINITE), tuple(points))


@st.composite
def _devices(draw: st.DrawFn) -> Device:
    table = {y: {x: draw(FACTORS) for x in (*STREAMS, "all") if x != y} for y in STREAMS}
    names = ("product", "message", "node_message", "copy", "rows", "outside")
    counts = ("ranks_per_node", "messages_at_once", "memory_bytes", "host_bytes")
    return machine(
        name=draw(st.text(max_size=5)),
        peer_us=draw(FINITE),
        issue_us=draw(FINITE),
        send_us=draw(FINITE),
        burst_us=draw(FINITE),
        together_gain=draw(FINITE),
        interference=interference(table),
        one_thread=draw(st.booleans()),
        pinned=draw(st.booleans()),
        **{name: draw(_speeds()) for name in names},
        **{name: draw(st.integers(1, 2**60)) for name in counts},
    )


@given(_devices())
def test_a_device_comes_back_from_its_text(device: Device) -> None:
    assert parse_device(json.loads(device_json(device))) == device


def test_a_device_comes_back_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(device_json(machine(name="Rüttgers' 4")), encoding="utf-8")
    assert load_device(path) == load_device(str(path)) == machine(name="Rüttgers' 4")


def test_a_device_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "FOLDER", tmp_path)
    for name in ("slow", "fast"):
        (tmp_path / f"{name}.json").write_text(device_json(machine(name=name)), encoding="utf-8")
    assert device_names() == ["fast", "slow"]
    assert load_device("fast").name == "fast"


@pytest.mark.parametrize("name", device_names())
def test_every_device_of_the_package_is_usable_and_says_where_its_figures_come_from(name: str) -> None:
    device = load_device(name)
    assert device.name == name
    words = ("measured", "published", "fitted", "assumed")
    assert any(word in device.origin.lower() for word in words), device.origin


def _content(path: str, value: object) -> dict[str, Any]:
    """A good file's content with one field, given by its dotted path, set otherwise."""
    content: dict[str, Any] = json.loads(device_json(machine()))
    *parents, last = path.split(".")
    part = content
    for name in parents:
        part = part[name]
    part[last] = value
    return content


NUMBERS = ["12", None, True, [], float("nan"), float("inf"), float("-inf"), -1, -0.5, 10**400]
COUNTS = [0, -1, True, 2.0, "2", None, float("nan")]
BAD = [
    *[(name, value, value) for name in ("name", "origin") for value in (1, None, True, ["x"])],
    *[(name, value, value) for name in ("one_thread", "pinned") for value in (0, 1, "yes", None)],
    *[(name, value, value) for name in ("ranks_per_node", "messages_at_once", "memory_bytes", "host_bytes")
      for value in COUNTS],
    *[(name, value, value) for name in ("peer_us", "issue_us", "send_us", "burst_us", "together_gain")
      for value in NUMBERS],
    *[("product.latency_us", value, value) for value in NUMBERS],
    *[("interference.comm.all", value, value) for value in [*NUMBERS, 0, 0.009, 1.001]],
    *[("copy.points", value, value) for value in ([], {}, None, "ab", [1, 2], [[1]], [[1, 2, 3]], [[1, 2], 3])],
    *[("copy.points", [[value, 5]], value) for value in NUMBERS],
    *[("copy.points", [[1, value]], value) for value in [*NUMBERS, 0]],
    ("copy.points", [[2, 1], [1, 1]], [2.0, 1.0]),  # volumes must grow
    ("copy.points", [[1, 1], [1, 2]], [1.0, 1.0]),
    ("copy.points", [[1, 1], [2, 4]], [1.0, 1.0]),  # and so must times: twice the volume at four times the rate
    *[(name, value, value) for name in ("message", "interference", "interference.copy") for value in (1, [], "x")],
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "shown"), BAD, ids=lambda part: str(part)[:20])
def test_a_bad_value_is_refused_by_field(path: str, value: object, shown: object) -> None:
    with pytest.raises(DeviceError) as caught:
        parse_device(_content(path, value), where="lab.json")
    text = str(caught.value)
    assert text.startswith(f"lab.json: {path}: got {shown!r}"), text
    assert "; accepted " in text, text


REQUIRED = [
    *[field.name for field in fields(Device)],
    "rows.latency_us", "rows.points", "interference.comm", "interference.comm.compute", "interference.compute.all",
]  # fmt: skip


@pytest.mark.parametrize("path", REQUIRED)
def test_a_missing_field_is_named(path: str) -> None:
    content = _content(path, None)
    *parents, last = path.split(".")
    part = content
    for name in parents:
        part = part[name]
    del part[last]
    where = re.escape(": ".join(["lab.json", *([".".join(parents)] if parents else [])]))
    with pytest.raises(DeviceError, match=rf"^{where}: lacks \['{last}'\]; accepted are exactly the fields"):
        parse_device(content, where="lab.json")


@pytest.mark.parametrize("path", ["speed", "product.unit", "interference.disk", "interference.comm.comm"])
def test_an_unknown_field_is_named(path: str) -> None:
    with pytest.raises(DeviceError, match=rf"has the unknown \['{path.split('.')[-1]}'\]; accepted are exactly"):
        parse_device(_content(path, 1.0))


@pytest.mark.parametrize("content", [None, 3, "text", [], [1]])
def test_a_file_must_hold_an_object(content: object) -> None:
    with pytest.raises(DeviceError, match=r"device: got .*; accepted is an object with the fields \['burst_us', "):
        parse_device(content)


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b'{"name": }', b"\xff\xfe\x00", b'"\xe9"', b"[" * 10**5, b'{"peer_us": ' + b"1" * 5000 + b"}"],
    ids=["empty", "cut", "comma", "utf16", "latin1", "deep", "digits"],
)
def test_what_is_not_json_is_refused_with_the_files_name(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(raw)
    with pytest.raises(DeviceError, match=r"broken\.json: is not JSON .*; write it again or take one of \["):
        load_device(path)


@pytest.mark.parametrize("name", ["a100_hdd", "", "/nowhere/device.json", "x" * 5000, ".", "/"])
def test_a_device_that_does_not_exist_is_refused_with_those_that_do(name: str) -> None:
    with pytest.raises(DeviceError, match=rf"device: got '{re.escape(name)}'.*; accepted is one of \[.*\] or the path"):
        load_device(name)


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ({}, r"interference: lacks \['comm', 'compute', 'copy'\]"),
        (alphas(comm_copy=1.5), r"interference\.comm\.copy: got 1\.5; accepted is a finite number from 0\.01 to 1"),
    ],
)
def test_a_table_from_mappings_is_checked_too(table: dict[str, dict[str, float]], text: str) -> None:
    with pytest.raises(DeviceError, match=text):
        interference(table)


def test_the_rate_is_piecewise_linear() -> None:
    """Half a megabyte per second up to 2 bytes, then growing to a whole one at 6."""
    speed = Speed(3.0, ((2.0, 0.5e6), (6.0, 1e6)))
    assert [speed.rate(volume) for volume in (1.0, 2.0, 4.0, 6.0, 100.0)] == [0.5e6, 0.5e6, 0.75e6, 1e6, 1e6]
    assert [speed.time_us(volume) for volume in (0.0, 1.0, 6.0, 100.0)] == [0.0, 3 + 2, 3 + 6, 3 + 100]


@given(_speeds(), st.lists(st.floats(0, LARGEST), min_size=2, max_size=2))
def test_more_takes_longer(speed: Speed, volumes: list[float]) -> None:
    less, more = sorted(volumes)
    one_us, two_us = (torch.tensor(speed.time_us(volume), dtype=torch.float64) for volume in (less, more))
    assert_equal_up_to_rounding("time", torch.maximum(one_us, two_us), two_us, roundings=8)
    assert not less or one_us >= speed.latency_us


@given(st.data())
def test_alpha_reads_the_table(data: st.DataObject) -> None:
    rows = {y: {x: data.draw(FACTORS) for x in (*STREAMS, "all") if x != y} for y in STREAMS}
    table = interference(rows)
    for stream in STREAMS:
        one, other = (name for name in STREAMS if name != stream)
        assert table.alpha(stream) == table.alpha(stream, frozenset({stream})) == 1  # type: ignore[arg-type]
        assert table.alpha(stream, frozenset({one, stream})) == rows[stream][one]  # type: ignore[arg-type]
        assert table.alpha(stream, frozenset(STREAMS)) == rows[stream]["all"]  # type: ignore[arg-type]
        assert table.pays(stream, one) == (rows[stream][one] > 0.5 and rows[one][stream] > 0.5)  # type: ignore[arg-type]
        assert table.pays(stream, other) == table.pays(other, stream)  # type: ignore[arg-type]


@pytest.mark.parametrize(("there", "back", "pays"), [(0.51, 0.51, True), (0.5, 1.0, False), (1.0, 0.5, False)])
def test_overlap_pays_only_above_one_half_in_both_directions(there: float, back: float, pays: bool) -> None:
    assert interference(alphas(comm_compute=there, compute_comm=back)).pays("comm", "compute") == pays


def test_messages_inside_a_node_between_nodes_and_alone() -> None:
    """4 ranks per node, 100 bytes/us inside, 10 between; each further rank adds 5 us."""
    device = machine(
        ranks_per_node=4, message=Speed(1.0, ((1.0, 100e6),)), node_message=Speed(2.0, ((1.0, 10e6),)), peer_us=5.0
    )
    assert device.message_us(600.0, 1) == device.message_us(0.0, 8) == 0
    assert device.message_us(600.0, 2) == 1 + 6
    assert device.message_us(600.0, 4) == 1 + 6 + 2 * 5
    assert device.message_us(700.0, 8) == 2 + 40 + 6 * 5  # 300 bytes stay in the node, 400 leave it
    slow_inside = machine(ranks_per_node=4, message=Speed(0.0, ((1.0, 1e6),)), node_message=Speed(0.0, ((1.0, 10e6),)))
    assert slow_inside.message_us(700.0, 8) == 300


@given(_devices(), st.floats(0, LARGEST), st.integers(2, 4096))
def test_a_message_takes_as_long_as_its_slower_part(device: Device, leaving_bytes: float, num_ranks: int) -> None:
    time_us = device.message_us(leaving_bytes, num_ranks)
    whole_inside = device.message.time_us(leaving_bytes)
    whole_between = device.node_message.time_us(leaving_bytes)
    allowed_us = max(whole_inside, whole_between) + device.peer_us * num_ranks
    assert 0 <= time_us <= allowed_us
    if num_ranks <= device.ranks_per_node and leaving_bytes:
        expected = torch.tensor(whole_inside + device.peer_us * (num_ranks - 2), dtype=torch.float64)
        assert_equal_up_to_rounding("inside", torch.tensor(time_us, dtype=torch.float64), expected, roundings=8)
