from pathlib import Path

import pytest
import torch

from configs.schema import load
from scripts.testbed.generation import BATCH_SENTENCES, batches, texts_of
from scripts.testbed.launch import compose
from scripts.testbed.quartet import QuartetModel, build
from scripts.testbed.tasks.build import build as build_task
from scripts.testbed.tasks.task import Task

CONFIG = load(compose("train", ["experiment=bliss/multi30k", "debug=smoke", "trainer.precision=fp32"]))
SOURCES = ["", "Haus", "Ein Mann.", "wort " * 400, "\u3042\U0001f600 \u0416", "  zwei  Blanke "]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Task, QuartetModel]:
    folder: Path = tmp_path_factory.mktemp("run")
    task = build_task(CONFIG, folder)
    return task, build(CONFIG, task, moe=False)


@pytest.mark.parametrize("beams", [1, 3])
def test_hostile_sources_get_a_text_each_in_their_order(parts: tuple[Task, QuartetModel], beams: int) -> None:
    task, model = parts
    model.train()
    texts = texts_of(model, task.tokenizer, SOURCES, config=CONFIG, num_beams=beams)
    assert len(texts) == len(SOURCES)
    assert all(isinstance(text, str) for text in texts)
    assert model.training
    reverse = texts_of(model, task.tokenizer, SOURCES[::-1], config=CONFIG, num_beams=beams)
    assert reverse == texts[::-1]
    assert texts_of(model, task.tokenizer, [], config=CONFIG, num_beams=beams) == []


def test_longer_sources_are_cut_where_the_model_ends(parts: tuple[Task, QuartetModel]) -> None:
    task, model = parts
    long = "wort " * 400
    cut = task.tokenizer.decode(
        task.tokenizer(long, truncation=True, max_length=CONFIG.model.max_length)["input_ids"][:-1]
    )
    both = texts_of(model, task.tokenizer, [long, cut], config=CONFIG, num_beams=1)
    assert both[0] == both[1]


def test_several_batches_are_put_together(parts: tuple[Task, QuartetModel]) -> None:
    task, model = parts
    many = [f"Haus {n}" for n in range(BATCH_SENTENCES + 3)]
    torch.manual_seed(0)
    assert len(texts_of(model, task.tokenizer, many, config=CONFIG, num_beams=1)) == len(many)


def test_a_gpu_gets_batches_of_as_many_tokens_as_it_decodes_at_once() -> None:
    tokens = [[0] * (1 + row % 300) for row in range(3000)]
    for device, budget in (("cpu", 0), ("cuda", 1 << 14)):
        found = list(batches(tokens, device))
        assert sorted(row for rows in found for row in rows) == list(range(3000))
        assert all(len(rows) == max(BATCH_SENTENCES, budget // len(tokens[rows[0]])) for rows in found[:-1])
    assert list(batches([], "cpu")) == []
