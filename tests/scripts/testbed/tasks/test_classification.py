from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from configs.schema import load
from scripts.testbed.launch import compose
from scripts.testbed.tasks.build import build
from scripts.testbed.tasks.task import Task

CONFIG = load(compose("train", ["experiment=moe_pipeline/upcycle_sentiment", "debug=smoke", "data.max_eval=40"]))


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return build(CONFIG, tmp_path_factory.mktemp("run"))


class Oracle:
    """A trainer whose network is right about every second example."""

    def predict(self, test_dataset: Any) -> Any:
        logits = np.zeros((len(test_dataset), 2))
        for index, example in enumerate(test_dataset):
            logits[index, example["labels"] if index % 2 else 1 - example["labels"]] = 1
        return SimpleNamespace(predictions=logits)


def test_accuracy_is_in_percent_under_the_providers_name(task: Task) -> None:
    assert task.evaluate(Oracle(), "moe").summary == {"accuracy": 50.0}
    assert task.evaluate(Oracle(), "dense").summary == {"accuracy_dense": 50.0}


def test_tfidf_is_a_baseline_and_a_translation_memory_is_not(task: Task) -> None:
    evaluation = task.baseline("tfidf")
    assert evaluation is not None
    assert 0 <= evaluation.summary["accuracy_tfidf"] <= 100
    assert task.baseline("memory") is None


def test_batches(task: Task) -> None:
    batch = task.collate(task.splits.train[:5])
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["labels"].shape == (5,)
    assert set(batch["labels"].tolist()) <= {0, 1}


def test_networks_of_a_task_are_equal(task: Task) -> None:
    first, second = task.network(), task.network()
    assert first.num_labels == 2
    assert all((a == b).all() for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_the_run_folder_gets_the_tokenizer(tmp_path: Path) -> None:
    build(CONFIG, tmp_path)
    assert (tmp_path / "tokenizer" / "tokenizer.json").is_file()
