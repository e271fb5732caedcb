"""An explanation chooses what fits, and says what is wrong with a budget or a device file that cannot be."""

import json
from pathlib import Path

import pytest

from configs.schema import load
from configs.typed import ConfigError
from moe_pipeline.plan.device import device_json, load_device
from scripts.testbed.benchmarks.moe_explain import tune
from scripts.testbed.launch import Outcome, Run, compose


def _explained(folder: Path, *settings: str) -> Outcome:
    config = load(compose("tune", ["experiment=moe_pipeline/explain", "debug=smoke", *settings]))
    return tune(config, Run(folder=folder, rank=0))


def test_a_budget_changes_the_choice(tmp_path: Path) -> None:
    free = _explained(tmp_path)
    assert (free.kind, free.summary["refused"]) == ("simulated", 0)
    tight = _explained(tmp_path, f"tune.device_budget_bytes={int(free.summary['device_bytes'] or 0) - 1}")
    assert int(tight.summary["device_bytes"] or 0) < int(free.summary["device_bytes"] or 0)
    assert float(tight.summary["predicted_us"] or 0) >= float(free.summary["predicted_us"] or 0)
    assert int(tight.summary["refused"] or 0) > 0


def test_a_budget_that_nothing_fits_says_what_would(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"device_budget_bytes: got 10 .* It fits with device_budget_bytes="):
        _explained(tmp_path, "tune.device_budget_bytes=10")


def test_a_device_file_with_a_missing_field_is_named(tmp_path: Path) -> None:
    content = json.loads(device_json(load_device("a100_hdr")))
    del content["copy"]
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"mine\.json: lacks \['copy'\]"):
        _explained(tmp_path, f"tune.device={file}")
