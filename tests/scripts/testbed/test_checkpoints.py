"""Whatever happens to a checkpoint, it is reported and the newest whole one before it is taken."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.testbed import checkpoints


def save(folder: Path, step: int) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(bytes(range(256)) * step)
    (checkpoint / "trainer_state.json").write_text("{}")
    checkpoints.seal(checkpoint)
    return checkpoint


def truncate(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def flip(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(bytes(content))


def rewrite(content: object) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint / checkpoints.MANIFEST).write_text(json.dumps(content))  # type: ignore[return-value]


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "interrupted": (lambda path: (path / checkpoints.MANIFEST).unlink(), "no manifest, so saving it was interrupted"),
    "truncated": (truncate, "model.safetensors has 511 bytes, expected 512"),
    "changed": (flip, "the content of model.safetensors was changed"),
    "missing": (lambda path: (path / "model.safetensors").unlink(), "model.safetensors is missing"),
    "foreign file": (lambda path: (path / "evil.pt").write_bytes(b"x"), "not in its manifest: evil.pt"),
    "half a manifest": (lambda path: (path / checkpoints.MANIFEST).write_text('{"format"'), "manifest cannot be read"),
    "another manifest": (rewrite([]), "manifest cannot be read"),
    "manifest of another format": (rewrite({"format": 9, "files": {}}), "format 9, expected 1"),
    "manifest without hashes": (rewrite({"format": 1, "files": {"a": {}}}), "manifest cannot be read"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_reported_and_the_last_good_checkpoint_is_taken(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    break_it, reason = DAMAGE[kind]
    break_it(bad)
    with caplog.at_level(logging.WARNING):
        assert checkpoints.newest(tmp_path) == good
    assert reason in caplog.text
    assert str(bad) in caplog.text


def test_the_newest_is_the_one_with_most_steps(tmp_path: Path) -> None:
    save(tmp_path, 10)
    save(tmp_path, 9)
    newest = checkpoints.newest(tmp_path)
    assert newest is not None
    assert newest.name == "checkpoint-10"


def test_strangers_beside_checkpoints_are_reported_and_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = save(tmp_path, 1)
    (tmp_path / "checkpoint-99").symlink_to(good)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "checkpoint-x").mkdir()
    with caplog.at_level(logging.WARNING):
        assert checkpoints.newest(tmp_path) == good
    for stranger in ("checkpoint-99", "notes.txt", "checkpoint-x"):
        assert f"{stranger} is not a checkpoint" in caplog.text
        assert (tmp_path / stranger).exists()


def test_nothing_to_continue(tmp_path: Path) -> None:
    assert checkpoints.newest(tmp_path / "absent") is None
    assert checkpoints.newest(tmp_path) is None
