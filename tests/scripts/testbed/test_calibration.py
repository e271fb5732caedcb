"""A calibrated device is whole: it reads back equal, its times grow, and no factor is above one."""

import json
from pathlib import Path

from moe_pipeline.plan.device import device_json, parse_device
from scripts.testbed.calibration import calibrate
from scripts.testbed.peers import MoESizes

SIZES = MoESizes(num_experts=2, top_k=1, d_model=16, d_hidden=32, gated=False, activation="relu")


def test_two_ranks_measure_a_device_that_can_be_used(tmp_path: Path) -> None:
    device = calibrate(SIZES, hosts=(), num_ranks=2, folder=tmp_path, repeats=1, name="here")
    assert parse_device(json.loads(device_json(device))) == device
    assert device.one_thread
    for speed in (device.product, device.message, device.copy, device.rows, device.outside):
        times = [speed.time_us(volume) for volume, _ in speed.points]
        assert times == sorted(times)
        assert times[0] > 0
