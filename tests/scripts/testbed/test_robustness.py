import dataclasses
from pathlib import Path

import pytest
import torch

from configs.schema import load
from scripts.testbed import probing, robustness
from scripts.testbed.launch import compose
from scripts.testbed.quartet import QuartetModel, build
from scripts.testbed.source_noise import KINDS
from scripts.testbed.tasks.build import build as build_task
from scripts.testbed.tasks.translation import Translation

CONFIG = load(compose("train", ["experiment=bliss/robustness", "debug=smoke", "comparison.noise_seeds=2"]))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Translation, QuartetModel]:
    folder: Path = tmp_path_factory.mktemp("run")
    task = build_task(CONFIG, folder)
    assert isinstance(task, Translation)
    return task, build(CONFIG, task, moe=False)


def test_scores_every_kind_and_level_with_a_band(parts: tuple[Translation, QuartetModel]) -> None:
    task, model = parts
    references = dict(zip(task.data.test["source"], task.data.test["target"], strict=True))
    found = robustness.measure(CONFIG, task, model, lambda texts: [references.get(text, "") for text in texts])
    values = {row.metric: row for row in found.rows}
    assert values["bleu_greedy"].value > 99
    for percent in (10, 30):
        for kind in (*KINDS, "seen", "unseen"):
            row = values[f"bleu_{kind}_{percent}"]
            assert row.low is not None
            assert row.high is not None
            assert row.low <= row.value <= row.high < 100
    for kind in KINDS:  # more noise, fewer sentences left as they were
        assert values[f"bleu_{kind}_30"].value < values[f"bleu_{kind}_10"].value
        assert values[f"state_cosine_{kind}_30"].value < values[f"state_cosine_{kind}_10"].value < 1
    (section,) = found.sections
    assert section.plots[0].startswith("<svg")
    one = dataclasses.replace(CONFIG.comparison, noise_percents=(10,), noise_seeds=1)
    alone = robustness.measure(dataclasses.replace(CONFIG, comparison=one), task, model, lambda texts: list(texts))
    assert {row.metric for row in alone.rows} >= {"bleu_shuffle", "bleu_seen", "bleu_unseen", "state_cosine_swap"}
    assert alone.sections == ()


def test_pooled_states_do_not_see_padding(parts: tuple[Translation, QuartetModel]) -> None:
    task, model = parts
    texts = list(task.data.test["source"])[:4]
    together = robustness.pooled_states(model, task, texts)
    alone = torch.cat([robustness.pooled_states(model, task, [text]) for text in texts])
    assert torch.nn.functional.cosine_similarity(together, alone).min() > 0.999
    assert together.dtype == torch.float32


def test_probes_have_an_accuracy_and_a_floor(parts: tuple[Translation, QuartetModel]) -> None:
    task, model = parts
    found = {row.metric: row.value for row in probing.rows(CONFIG, task, model)}
    assert {"probe_length", "probe_length_commonest", "probe_bigram_shift"} <= set(found)
    assert all(0 <= value <= 100 for value in found.values())
