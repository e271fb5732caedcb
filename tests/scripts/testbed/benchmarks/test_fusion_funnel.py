"""The worked example's counts, and that three ways to search agree on what is best."""

from pathlib import Path

import pytest

from configs.schema import load
from configs.typed import ConfigError
from scripts.testbed.benchmarks import fusion_funnel
from scripts.testbed.launch import Outcome, Run, compose


def funnel(folder: Path, *overrides: str) -> Outcome:
    config = load(compose("tune", ["experiment=fusion/funnel", *overrides]))
    return fusion_funnel.tune(config, Run(folder=folder, rank=0))


def test_the_papers_counts(tmp_path: Path) -> None:
    outcome = funnel(tmp_path)
    assert {name: outcome.summary[name] for name in fusion_funnel.PAPER} == fusion_funnel.PAPER
    counted = [outcome.summary[name] for name in ("candidates", "after_rule3", "after_rule4")]
    assert counted == [26 * 64 * 64 * 32 * 32, 3 * 14 * 14 * 8 * 8, 24_144]
    times = {row.provider: row.value for row in outcome.rows if row.metric == "predicted_time"}
    assert times["a100_exhaustive"] <= min(times["a100_algorithm_1"], times["a100_random"])
    assert {row.kind for row in outcome.rows if row.provider == "MCFuser"} == {"paper"}


def test_another_chain_has_no_figures_of_the_papers(tmp_path: Path) -> None:
    outcome = funnel(tmp_path, "debug=smoke")
    assert not any(row.provider == "MCFuser" for row in outcome.rows)
    assert outcome.summary["candidates"] == 26 * 8 * 8 * 4 * 4


def test_an_unknown_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tune\.kernels\.devices: device: got 'a1000'"):
        funnel(tmp_path, "tune.kernels.devices=[a1000]")
