import json
import logging
from pathlib import Path

import pytest
import torch

from configs.schema import Config, load
from scripts.testbed import threads
from scripts.testbed.launch import compose


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "quartet" / "threads.json"


def config(*overrides: str) -> Config:
    return load(compose("train", ["experiment=quartet/demo", *overrides]))


def test_the_configuration_wins_then_what_was_tuned_then_torch() -> None:
    assert threads.chosen(config()) == torch.get_num_threads()
    threads.keep(threads.key(config()), 7)
    assert threads.chosen(config()) == 7
    assert threads.chosen(config("trainer.threads=3")) == 3


def test_a_number_is_kept_for_one_network_alone() -> None:
    threads.keep(threads.key(config()), 7)
    assert threads.chosen(config("model.d_model=64")) == torch.get_num_threads()
    threads.keep(threads.key(config("model.d_model=64")), 2)
    assert threads.chosen(config()) == 7


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"format": 2, "threads": {}}',
        '{"format": 1, "threads": 3}',
        '{"format": 1, "threads": {"x": "7"}}',
        '{"format": 1, "threads": {"x": 0}}',
        '{"format": 1, "threads": {"x": true}}',
    ],
)
def test_a_damaged_cache_is_reported_and_rebuilt(content: str, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text(content)
    with caplog.at_level(logging.WARNING):
        assert threads.chosen(config()) == torch.get_num_threads()
    assert "is ignored and will be rewritten" in caplog.text
    threads.keep("x", 5)
    assert json.loads(cache.read_text()) == {"format": 1, "threads": {"x": 5}}
