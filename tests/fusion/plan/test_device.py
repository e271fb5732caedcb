"""What comes with the package, and that a file which cannot be used is refused with the field it fails at."""

import json
import re
from dataclasses import asdict, fields

import pytest

from fusion.plan.device import Device, DeviceError, device_names, load_device, parse_device

GOOD = asdict(load_device("a100"))


def test_five_devices_come_with_the_package():
    assert device_names() == ["a100", "cpu", "h100", "mi300", "rtx3080"]


@pytest.mark.parametrize("name", device_names())
def test_every_device_says_where_its_figures_come_from(name):
    device = load_device(name)
    assert device.name == name
    assert re.search("Data sheet|[Ww]hitepaper|Measured there", device.origin)


def test_the_limits_of_a_block_are_the_most_that_it_may_ask_for():
    kib = {name: load_device(name).shared_bytes_per_block / 1024 for name in device_names()}
    assert kib == {"a100": 163, "rtx3080": 99, "h100": 227, "mi300": 64, "cpu": 1024}
    targets = {name: (load_device(name).kind, load_device(name).arch) for name in device_names()}
    assert targets == {
        "a100": ("cuda", "80"), "rtx3080": ("cuda", "86"), "h100": ("cuda", "90"), "mi300": ("hip", "gfx942"),
        "cpu": ("cpu", "avx512"),
    }  # fmt: skip
    assert load_device("mi300").warp_size == 64


def test_the_peak_is_that_of_the_dtype():
    device = load_device("a100")
    assert [device.flops_per_s(dtype) for dtype in ("fp32", "fp16", "bf16")] == [19.5e12, 312e12, 312e12]


def test_a_device_comes_back_from_a_file(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(GOOD | {"name": "mine"}), encoding="utf-8")
    assert load_device(path) == load_device(str(path)) == Device(**(GOOD | {"name": "mine"}))


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [
        ("name", "", "text that is not empty"),
        ("origin", 3, "text that is not empty"),
        ("kind", "rocm", "one of ('cuda', 'hip', 'cpu')"),
        ("arch", 80, "text that is not empty"),
        ("kind", ["cuda"], "one of ('cuda', 'hip', 'cpu')"),
        ("fp32_flops_per_s", "1e12", "a finite number of at least 1"),
        ("fp16_flops_per_s", float("inf"), "a finite number of at least 1"),
        ("bf16_flops_per_s", float("nan"), "a finite number of at least 1"),
        ("dram_bytes_per_s", 0, "a finite number of at least 1"),
        ("dram_bytes_per_s", True, "a finite number of at least 1"),
        ("dram_bytes_per_s", 10**400, "a finite number of at least 1"),
        ("num_sms", 1.0, "an integer of at least 1"),
        ("num_sms", True, "an integer of at least 1"),
        ("registers_per_sm", 0, "an integer of at least 1"),
        ("shared_bytes_per_block", 167937, "at most shared_bytes_per_sm, 167936"),
    ],
)
def test_a_field_out_of_range_is_refused(field, value, accepted, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(GOOD | {field: value}), encoding="utf-8")
    message = f"{re.escape(str(path))}: {field}: got .*; accepted is {re.escape(accepted)}"
    with pytest.raises(DeviceError, match=message):
        load_device(path)


@pytest.mark.parametrize("field", [field.name for field in fields(Device)])
def test_a_missing_field_is_refused(field):
    content = {name: value for name, value in GOOD.items() if name != field}
    with pytest.raises(DeviceError, match=rf"mine: lacks \['{field}'\]; accepted are exactly the fields"):
        parse_device(content, where="mine")


def test_an_unknown_field_is_refused():
    with pytest.raises(DeviceError, match=r"device: has the unknown \['cores'\]; accepted are exactly the fields"):
        parse_device(GOOD | {"cores": 2})


@pytest.mark.parametrize(("text", "problem"), [("[1]", r"got \[1\]; accepted is an object"), ("{", "is not JSON")])
def test_other_files_are_refused(text, problem, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DeviceError, match=problem):
        load_device(path)


def test_an_unknown_name_is_refused_with_those_that_exist():
    with pytest.raises(DeviceError, match=r"got 'v100' \(No such file or directory\); accepted is one of \['a100', "):
        load_device("v100")
