from pathlib import Path

import pytest
import safetensors.torch
import torch

from scripts.testbed import checkpoints
from scripts.testbed.averaging import newest_weights


def save(folder: Path, step: int, value: float, *, sealed: bool = True) -> None:
    own = folder / f"checkpoint-{step}"
    own.mkdir(parents=True)
    state = {"w": torch.full((2,), value), "b": torch.full((2,), value, dtype=torch.bfloat16), "n": torch.tensor(3)}
    safetensors.torch.save_file(state, own / "model.safetensors")
    if sealed:
        checkpoints.seal(own)


def test_averages_the_newest_whole_ones(tmp_path: Path) -> None:
    for step, value in ((100, 8.0), (900, 1.0), (1000, 3.0)):
        save(tmp_path, step, value)
    save(tmp_path, 1100, 99.0, sealed=False)
    (tmp_path / "notes").mkdir()
    found = newest_weights(tmp_path, 2)
    assert found["w"].tolist() == [2.0, 2.0]
    assert found["b"].dtype == torch.bfloat16
    assert found["n"] == 3
    assert newest_weights(tmp_path, 9)["w"].tolist() == [4.0, 4.0]


def test_says_where_nothing_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no whole checkpoint"):
        newest_weights(tmp_path, 2)
