import dataclasses
from pathlib import Path

import pytest

from configs.schema import Config, load
from configs.typed import ConfigError
from scripts.testbed import rows, verdicts
from scripts.testbed.launch import compose
from scripts.testbed.rows import Result, Row
from scripts.testbed.tasks.scores import BLEU

SOURCES = [""] * 20
REFERENCES = [[f"a man number {n} in a blue shirt ."] for n in range(20)]


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    return tmp_path


def config_of(*overrides: str) -> Config:
    config = load(compose("train", ["experiment=bliss/multi30k", "trainer.max_steps=50", *overrides]))
    return dataclasses.replace(config, record=True)


def record(config: Config, **values: float) -> None:
    found = tuple(
        Row(provider=config.comparison.method, metric=name + verdicts.suffix(config), unit="x", value=value)
        for name, value in values.items()
    )
    result = Result(
        experiment=config.name, kind="measured", rows=found, summary={}, seed=config.seed, data_sha256="",
        commit="c", device="d", versions={}, date="2026-01-01",
    )  # fmt: skip
    rows.record(result, one_run=True)


def test_a_run_is_known_by_method_seed_budget_and_updates() -> None:
    done = config_of("seed=2")
    assert verdicts.recorded(done) == []
    record(done, bleu=30.0, updates=50.0)
    assert [(row.metric, row.value) for row in verdicts.recorded(done)] == [("bleu", 30.0), ("updates", 50.0)]
    for other in (
        config_of("seed=1"),
        config_of("seed=2", "objective=r_drop"),
        config_of("seed=2", "comparison.budget=time"),
        config_of("seed=2", "trainer.max_steps=60"),
    ):
        assert verdicts.recorded(other) == []


def test_recording_one_run_leaves_the_others_and_replaces_its_own() -> None:
    first, second = config_of("seed=1"), config_of("seed=2")
    equal_time = config_of("seed=1", "comparison.budget=time")
    record(first, bleu=30.0, updates=50.0)
    record(second, bleu=31.0, updates=50.0)
    record(equal_time, bleu=29.0, updates=50.0)
    record(first, bleu=32.0, updates=50.0)
    assert verdicts.recorded(first)[0].value == 32.0
    assert verdicts.recorded(second)[0].value == 31.0
    assert verdicts.recorded(equal_time)[0].value == 29.0


def test_equal_time_shortens_the_run_by_what_a_step_costs() -> None:
    slow = config_of("objective=r_drop", "comparison.budget=time")
    with pytest.raises(ConfigError, match="no step time of r_drop is on record; measure it with"):
        verdicts.budgeted(slow)
    overhead = load(compose("bench", ["experiment=bliss/overhead"]))
    timed = (Row(provider="r_drop", metric="step_time_ratio", unit="x plain", value=2.5),)
    result = Result(
        experiment=overhead.name, kind="measured", rows=timed, summary={}, seed=1, data_sha256="",
        commit="c", device="d", versions={}, date="2026-01-01",
    )  # fmt: skip
    rows.record(result)
    assert verdicts.budgeted(slow).trainer.max_steps == 20
    assert verdicts.budgeted(config_of("objective=r_drop")).trainer.max_steps == 50


def test_p_values_need_the_baselines_run_of_the_same_seed() -> None:
    good = BLEU.figures([own[0] for own in REFERENCES], REFERENCES, SOURCES)
    bad = BLEU.figures(["a man number in blue shirt ."] * 20, REFERENCES, SOURCES)
    assert verdicts.compare(config_of("seed=1", "objective=r_drop"), BLEU, good) is None
    assert verdicts.compare(config_of("seed=1"), BLEU, bad) is None  # the baseline itself
    assert verdicts.compare(config_of("seed=2", "objective=r_drop"), BLEU, good) is None
    assert verdicts.compare(config_of("seed=1", "objective=r_drop"), BLEU, good) == 1 / 1001
    assert verdicts.compare(config_of("seed=1", "objective=simcut"), BLEU, bad) == 1.0
    equal_time = config_of("seed=1", "objective=simcut", "comparison.budget=time")
    assert verdicts.compare(equal_time, BLEU, bad) == 1.0  # the baseline's one run serves both budgets
