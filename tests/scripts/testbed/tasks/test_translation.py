from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from configs.schema import load
from configs.typed import ConfigError
from scripts.testbed.launch import compose
from scripts.testbed.tasks.build import build
from scripts.testbed.tasks.task import IGNORED, Task, by_length, pad

CONFIG = load(compose("train", ["experiment=quartet/demo", "debug=smoke", "model.max_length=128"]))


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return build(CONFIG, tmp_path_factory.mktemp("run"))


class Oracle:
    """A trainer whose network answers every sentence with its reference."""

    def predict(self, test_dataset: Any) -> Any:
        length = max(len(example["labels"]) for example in test_dataset) + 3
        rows = [[*example["labels"], *[IGNORED] * (length - len(example["labels"]))] for example in test_dataset]
        return SimpleNamespace(predictions=np.array(rows))


def test_the_reference_itself_scores_a_hundred_and_examples_stay_in_order(task: Task) -> None:
    evaluation = task.evaluate(Oracle(), "oracle")
    assert evaluation.summary["bleu"] > 99.9
    table = evaluation.sections[0].table
    assert table is not None
    assert len(table.rows) == 10
    assert all(reference == output for _, reference, output in table.rows)


def test_baselines(task: Task) -> None:
    copy, memory = task.baseline("copy"), task.baseline("memory")
    assert copy is not None
    assert memory is not None
    assert "bleu_copy" in copy.summary
    assert "bleu_memory" in memory.summary
    assert task.baseline("tfidf") is None


def test_a_batch_is_padded_on_the_right_and_knows_its_epoch(task: Task) -> None:
    examples = [{"input_ids": [5, 6, 1], "labels": [7, 1], "sentence_id": 3, "epoch": 4},
                {"input_ids": [8, 1], "labels": [9, 5, 1], "sentence_id": 9, "epoch": 4}]  # fmt: skip
    batch = task.collate(examples)
    padding = task.tokenizer.pad_token_id
    assert batch["input_ids"].tolist() == [[5, 6, 1, *[padding] * 5], [8, 1, *[padding] * 6]]
    assert batch["attention_mask"].sum(1).tolist() == [3, 2]
    assert batch["labels"].tolist() == [[7, 1, *[IGNORED] * 6], [9, 5, 1, *[IGNORED] * 5]]
    assert batch["sentence_id"].tolist() == [3, 9]
    assert int(batch["epoch"]) == 4


def test_the_tokenizer_is_saved_with_the_run_and_saw_the_training_split_alone(tmp_path: Path) -> None:
    task = build(CONFIG, tmp_path)
    assert (tmp_path / "tokenizer" / "tokenizer.json").is_file()
    assert len(task.tokenizer) <= CONFIG.model.vocab_size
    other = build(load(compose("train", ["experiment=quartet/demo", "debug=smoke", "data.max_eval=5"])), tmp_path)
    assert other.tokenizer.get_vocab() == task.tokenizer.get_vocab()


def test_data_and_network_must_fit(tmp_path: Path) -> None:
    config = load(compose("train", ["experiment=quartet/demo", "debug=smoke", "data.name=vader_movie"]))
    with pytest.raises(ConfigError, match=r"model\.kind: got pegasus for vader_movie, which is classification"):
        build(config, tmp_path)


def test_padding_helpers() -> None:
    assert pad([[1], [2, 3]], 0).tolist() == [[1, *[0] * 7], [2, 3, *[0] * 6]]
    assert [len(example["input_ids"]) for example in by_length([{"input_ids": [1]}, {"input_ids": [1, 2]}])] == [2, 1]
