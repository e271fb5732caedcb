import dataclasses
from pathlib import Path

import numpy as np
import pytest

from configs.schema import Config, load
from scripts.testbed import comparison, verdicts
from scripts.testbed.launch import Run, compose
from scripts.testbed.tasks import edits
from scripts.testbed.tasks.scores import Metric


def config_of(*overrides: str) -> Config:
    return load(compose("train", ["experiment=bliss/gec_small", "debug=smoke", *overrides]))


def test_a_further_metric_scores_the_method_and_what_needs_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = Metric(
        name="changed",
        unit="percent",
        figures=lambda texts, references, sources: np.array(
            [[text != source, 1.0] for text, source in zip(texts, sources, strict=True)]
        ),
        score=lambda sums: 100 * float(sums[0] / sums[1]),
        parts={"count": lambda sums: float(sums[1])},
    )
    monkeypatch.setattr(edits, "ERRANT", changed)
    monkeypatch.setattr(edits, "missing", lambda: None)
    outcome = comparison.train(config_of(), Run(folder=tmp_path, rank=0))
    found = {(row.provider, row.metric): row.value for row in outcome.rows}
    assert found["plain", "count"] == found["copy", "count"] == 12
    assert found["plain", "changed"] > found["copy", "changed"] == 0
    assert "gleu" in {metric for _, metric in found}


def test_what_is_scored_does_not_decide_which_trained_weights_are_taken(tmp_path: Path) -> None:
    run = Run(folder=tmp_path, rank=0)
    homes = {comparison.home(config_of(f"comparison.errant={choice}"), run) for choice in ("null", "true", "false")}
    assert len(homes) == 1
    config = config_of()
    longer = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, max_steps=7))
    assert comparison.home(longer, run) not in homes


def test_a_run_of_equal_time_leaves_the_figures_of_equal_updates_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdicts, "step_time_ratio", lambda config: 2.0)
    config = config_of("objective=word_dropout", "comparison.budget=time", "comparison.probes=true")
    outcome = comparison.train(config, Run(folder=tmp_path, rank=0))
    metrics = {row.metric for row in outcome.rows}
    assert {"gleu_equal_time", "gleu_greedy_equal_time", "probe_length_equal_time"} <= metrics
    assert all(metric.endswith("_equal_time") for metric in metrics)
