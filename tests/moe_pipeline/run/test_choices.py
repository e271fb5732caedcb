"""What searches found survives in files that nobody needs to trust."""

import json
import logging
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from moe_pipeline.config import PipelineConfig
from moe_pipeline.plan.chooser import Chooser, Situation
from moe_pipeline.plan.granularity import SearchRules
from moe_pipeline.plan.ledger import LayerShape
from moe_pipeline.plan.rings import HiddenShape
from moe_pipeline.run.choices import VERSION, Choices
from moe_pipeline.run.ranks import expert_ranks

CPU = torch.device("cpu")
SHAPE = LayerShape(
    tokens=1,
    top_k=1,
    d_model=8,
    hidden=HiddenShape(d_hidden=16, gated=False, in_place=True),
    num_experts=4,
    num_ranks=2,
)


def _auto(folder: Path) -> PipelineConfig:
    return PipelineConfig(num_chunks="auto", cache_folder=str(folder))


def _searched(folder: Path, best: int = 4) -> Chooser:
    chooser = Chooser(_auto(folder), SHAPE, SearchRules(allowance=1000))
    for _ in range(40):
        plan = chooser.choose(Situation(tokens=1000))
        chooser.observe(100.0 + 10 * abs(plan.fixed_chunks - best))
    return chooser


def _restored(folder: Path) -> Chooser:
    chooser = Chooser(_auto(folder), SHAPE)
    Choices.of(_auto(folder), SHAPE, dtype=torch.float32, device=CPU).restore(chooser, None, CPU)
    return chooser


def _keep(folder: Path, best: int = 4) -> Path:
    Choices.of(_auto(folder), SHAPE, dtype=torch.float32, device=CPU).keep(_searched(folder, best), None)
    (path,) = folder.iterdir()
    return path


def test_a_later_run_begins_with_what_was_found(tmp_path: Path) -> None:
    _keep(tmp_path / "new")
    assert _restored(tmp_path / "new").choose(Situation(tokens=1000)).num_chunks == 4
    assert _restored(tmp_path / "empty").state() == {}


def test_nothing_is_kept_without_a_folder() -> None:
    config = PipelineConfig(num_chunks="auto")
    chooser = Chooser(config, SHAPE)
    choices = Choices.of(config, SHAPE, dtype=torch.float32, device=CPU)
    choices.restore(chooser, None, CPU)
    choices.keep(chooser, None)
    assert chooser.state() == {}


def test_another_layer_or_setting_has_another_file(tmp_path: Path) -> None:
    _keep(tmp_path)
    other = LayerShape(**{**vars(SHAPE), "d_model": 9})
    for config, shape in (
        (_auto(tmp_path), other),
        (PipelineConfig(num_chunks="auto", split="local", cache_folder=str(tmp_path)), SHAPE),
    ):
        chooser = Chooser(config, shape)
        Choices.of(config, shape, dtype=torch.float32, device=CPU).restore(chooser, None, CPU)
        assert chooser.state() == {}


def _of_another_version(content: dict[str, dict[str, object]]) -> None:
    content["key"]["version"] = VERSION + 1


def _of_another_layer(content: dict[str, dict[str, object]]) -> None:
    content["key"]["machine"] = "another"


def _without_searches(content: dict[str, dict[str, object]]) -> None:
    del content["searches"]


def _with_a_wrong_number(content: dict[str, dict[str, object]]) -> None:
    content["searches"] = {"none": {"1024": {"num_chunks": 5, "reference_us": 1.0}}}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_of_another_version, f"written for version {VERSION + 1} or another layer; accepted is version {VERSION}"),
        (_of_another_layer, "or another layer"),
        (_without_searches, "does not hold a key and searches"),
        (_with_a_wrong_number, "got num_chunks=5"),
    ],
)
def test_a_file_that_says_something_else_is_reported_and_written_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: object, reason: str
) -> None:
    path = _keep(tmp_path)
    content = json.loads(path.read_text())
    change(content)  # type: ignore[operator]
    path.write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING):
        assert _restored(tmp_path).state() == {}
    assert str(path) in caplog.text
    assert reason in caplog.text
    assert _keep(tmp_path, best=6) == path
    assert _restored(tmp_path).choose(Situation(tokens=1000)).num_chunks == 6


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"{", b"[]", b"null"])
def test_a_corrupt_file_is_no_worse_than_none(tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes) -> None:
    path = _keep(tmp_path)
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert _restored(tmp_path).state() == {}
    assert (str(path) in caplog.text) == bool(content), "an empty file holds nothing, others are reported"


def test_a_folder_that_cannot_be_written_costs_only_the_next_search(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    chooser = _searched(blocked)
    with caplog.at_level(logging.WARNING):
        Choices.of(_auto(blocked), SHAPE, dtype=torch.float32, device=CPU).keep(chooser, None)
    assert "cannot be written, so the next run searches again" in caplog.text


def _each_from_its_own_folder(rank: int, num_ranks: int, folder: str) -> None:
    own = Path(folder) / str(rank)
    ranks = expert_ranks()
    choices, chooser = Choices.of(_auto(own), SHAPE, dtype=torch.float32, device=CPU), Chooser(_auto(own), SHAPE)
    choices.restore(chooser, ranks, CPU)
    assert chooser.choose(Situation(tokens=1000)).num_chunks == 4, "what the first rank's file says"
    choices.keep(_searched(own, best=3), ranks)
    written = {path.name for path in own.iterdir()} if own.exists() else set()
    assert bool(written) == (rank == 0), "the first rank writes for all"


def test_all_ranks_begin_with_what_the_first_one_read(tmp_path: Path) -> None:
    _keep(tmp_path / "0")
    run_ranks(2, _each_from_its_own_folder, str(tmp_path))
