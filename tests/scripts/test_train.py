"""Whatever stops a run, it continues to the very bits of the run that was not stopped."""

import errno
import json
import logging
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from configs.schema import Config, load
from scripts import train
from scripts.testbed import checkpoints
from scripts.testbed.launch import Run, compose
from scripts.testbed.rows import REPOSITORY

DEMO = ("experiment=quartet/demo", "debug=smoke")
KILLED = -9

# Runs the verb as the command line does, and sends the process a signal at a named place.
DRIVER = """
import os, sys
from scripts import train
from scripts.testbed import launch
from scripts.testbed.trainer import QuartetTrainer

name, step, number = sys.argv.pop(1), int(sys.argv.pop(1)), int(sys.argv.pop(1))
original = getattr(QuartetTrainer, name)

def killer(self, *arguments, **settings):
    if self.state.global_step == step:
        os.kill(os.getpid(), number)
    return original(self, *arguments, **settings)

setattr(QuartetTrainer, name, killer)
launch.main("train", train.train)
"""


def process(
    folder: Path, *arguments: str, kill: tuple[str, int] | None = None, number: int = signal.SIGKILL
) -> subprocess.CompletedProcess[str]:
    place = kill or ("training_step", -1)
    return subprocess.run(
        [sys.executable, "-c", DRIVER, place[0], str(place[1]), str(int(number)), *DEMO, *arguments],
        cwd=folder,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin", "HOME": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip


def outcome(run: subprocess.CompletedProcess[str], folder: Path) -> dict[str, Any]:
    assert run.returncode == 0, run.stderr
    summary = json.loads(run.stdout.splitlines()[-1])["summary"]
    weights = next(folder.glob("outputs/*/quartet_demo/checkpoints/checkpoint-6/model.safetensors"))
    figures = {name: summary[name] for name in ("final_loss", "final_valid_loss", "bleu", "expert_similarity")}
    return figures | {name: tensor.tolist() for name, tensor in safetensors.torch.load_file(weights).items()}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    return outcome(process(folder), folder)


@pytest.mark.parametrize(
    "kill",
    [("training_step", 5), ("_save_optimizer_and_scheduler", 3), ("_save_rng_state", 6)],
    ids=["in a step", "in the first checkpoint", "in the last checkpoint"],
)
def test_a_killed_run_ends_bit_for_bit_as_if_it_had_not_been(
    kill: tuple[str, int], uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    assert process(tmp_path, kill=kill).returncode == KILLED
    resumed = process(tmp_path, "resume=auto")
    found = outcome(resumed, tmp_path)
    assert [name for name in uninterrupted if found[name] != uninterrupted[name]] == []
    assert ("continuing from" in resumed.stderr) == (kill[0] != "_save_optimizer_and_scheduler")
    assert len(list(tmp_path.glob("outputs/*/*"))) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_asked_to_stop_saves_and_says_how_to_go_on(
    number: signal.Signals, uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    stopped = process(tmp_path, kill=("training_step", 3), number=number)
    assert stopped.returncode == 1
    assert "stopped at step 4; continue with: resume=auto" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    found = outcome(process(tmp_path, "resume=auto"), tmp_path)
    assert [name for name in uninterrupted if found[name] != uninterrupted[name]] == []
    state = next(tmp_path.glob("outputs/*/quartet_demo/checkpoints/checkpoint-6/trainer_state.json"))
    timed = [entry for entry in json.loads(state.read_text())["log_history"] if "seconds" in entry]
    for name in ("seconds", "cpu_seconds", "num_tokens"):  # both runs' together
        assert [entry[name] for entry in timed] == sorted({entry[name] for entry in timed}), name


def test_a_run_of_another_configuration_is_not_continued(tmp_path: Path) -> None:
    assert process(tmp_path, kill=("training_step", 4)).returncode == KILLED
    refused = process(tmp_path, "resume=auto", "trainer.learning_rate=0.5", "moe=off")
    assert refused.returncode == 1
    assert re.search(
        r"moe\.enabled was True and is False, trainer\.learning_rate was 0\.003 and is 0\.5", refused.stderr
    )
    assert "Traceback" not in refused.stderr


def smoke(*overrides: str) -> Config:
    return load(compose("train", [*DEMO, *overrides]))


@pytest.mark.parametrize(("step", "good"), [(3, 6), (6, 3)])
def test_a_full_disk_is_reported_and_training_goes_on(
    step: int, good: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = safetensors.torch.save_file

    def save(tensors: Any, path: Path, *arguments: Any, **settings: Any) -> None:
        if f"checkpoint-{step}" in str(path):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        original(tensors, path, *arguments, **settings)

    monkeypatch.setattr(safetensors.torch, "save_file", save)
    with caplog.at_level(logging.WARNING):
        outcome = train.train(smoke("bliss=off", "omoe=off", "baselines=[]"), Run(folder=tmp_path, rank=0))
    assert f"checkpoint-{step} was not saved ([Errno 28] No space left on device)" in caplog.text
    assert not (tmp_path / "checkpoints" / f"checkpoint-{step}").exists()
    assert checkpoints.newest(tmp_path / "checkpoints") == tmp_path / "checkpoints" / f"checkpoint-{good}"
    assert "bleu" in outcome.summary


@pytest.mark.parametrize("off", ["moe", "omoe", "bliss"])
def test_each_method_can_be_left_out(off: str, tmp_path: Path) -> None:
    outcome = train.train(smoke(f"{off}=off", "baselines=[]", "trainer.max_steps=3"), Run(folder=tmp_path, rank=0))
    assert ("expert_similarity" in outcome.summary) == (off != "moe")
    assert {"bleu", "train_seconds", "tokens_per_s", "final_loss"} <= outcome.summary.keys()
    row = dict(outcome.sections[0].table.rows)["moe_pipeline" if off == "moe" else off]  # type: ignore[union-attr]
    assert row == "off"


def test_accumulated_batches_train_as_one(tmp_path: Path) -> None:
    outcome = train.train(
        smoke("trainer.accumulation_steps=2", "baselines=[]", "trainer.max_steps=3"), Run(folder=tmp_path, rank=0)
    )
    assert outcome.summary["final_loss"]
