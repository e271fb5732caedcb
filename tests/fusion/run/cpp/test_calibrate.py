import json

from fusion.plan.device import parse_device
from fusion.run.cpp import calibrate
from fusion.run.cpp.calibrate import device_path, measure_cpu, this_cpu


def test_this_cpu_is_measured_once_and_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    device = this_cpu()
    assert device.kind == "cpu"
    assert device.fp32_flops_per_s > 1e8
    assert device.dram_bytes_per_s > 1e7
    assert parse_device(json.loads(device_path().read_text())) == device
    monkeypatch.setattr(calibrate, "measure_cpu", lambda: None)
    assert this_cpu() == device


def test_a_file_that_cannot_be_used_is_measured_again(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    device_path().parent.mkdir(parents=True)
    device_path().write_text("{}")
    device = measure_cpu()
    monkeypatch.setattr(calibrate, "measure_cpu", lambda: device)
    assert this_cpu() == device
    assert parse_device(json.loads(device_path().read_text())) == device
