"""The same verb on two gloo ranks: both train on one sequence of batches, and the first writes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from configs.schema import load
from scripts.testbed import quartet
from scripts.testbed.checkpoints import damage
from scripts.testbed.launch import compose
from scripts.testbed.rows import REPOSITORY
from scripts.testbed.tasks.build import build as build_task
from tests.scripts.test_train import DRIVER

ENVIRONMENT = {
    "PYTHONPATH": str(REPOSITORY),
    "PATH": "/usr/bin:/bin",
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "DS_ACCELERATOR": "cpu",
}
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
            "--rdzv-endpoint", "localhost:0"]  # fmt: skip
DEMO = ["experiment=quartet/demo", "debug=smoke", "cluster=cpu_2ranks", "baselines=[]"]
SPREAD = ["moe.expert_ranks=2", "moe.pipeline.num_chunks=2", "data.max_eval=4"]


def ranks(folder: Path, *settings: str, killed_at: int | None = None) -> subprocess.CompletedProcess[str]:
    """The verb on two ranks, which end by a signal in a step, if one is named."""
    driver = folder / "driver.py"
    driver.write_text(DRIVER)
    what = [str(driver), "training_step", str(killed_at), "9"] if killed_at else ["-m", "scripts.train"]
    environment = {**ENVIRONMENT, "HOME": str(folder)}
    return subprocess.run(
        [*LAUNCHER, *what, *DEMO, *settings], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )


def summary(run: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert run.returncode == 0, run.stderr[-3000:]
    (line,) = [line for line in run.stdout.splitlines() if line.startswith("{")]
    return json.loads(line)["summary"]  # type: ignore[no-any-return]


def last_checkpoint(folder: Path) -> Path:
    assert len(list(folder.glob("outputs/*/*"))) == 1
    (checkpoint,) = folder.glob("outputs/*/*/checkpoints/checkpoint-6")
    assert {"model.safetensors", "rng_state_0.pth", "rng_state_1.pth"} <= set(os.listdir(checkpoint))
    assert damage(checkpoint) is None
    return checkpoint


def losses(checkpoint: Path) -> list[float]:
    log = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in log for name in ("loss", "grad_norm", "eval_loss") if name in entry]


@pytest.mark.parametrize(
    "settings",
    [["omoe.space=input"], SPREAD, ["trainer.deepspeed=zero2", "omoe=off"]],
    ids=["DDP with OMoE", "spread experts with OMoE", "ZeRO-2"],
)
def test_two_ranks_train_as_one_run(settings: list[str], tmp_path: Path) -> None:
    assert summary(ranks(tmp_path, *settings))["final_loss"] > 0
    last_checkpoint(tmp_path)


@pytest.mark.parametrize("deepspeed", ["off", "zero2"])
def test_spread_experts_are_saved_whole_and_a_killed_run_ends_as_if_it_had_not_been(
    deepspeed: str, tmp_path: Path
) -> None:
    settings = (*SPREAD, "omoe=off" if deepspeed == "zero2" else "omoe=on", f"trainer.deepspeed={deepspeed}")
    folders = [tmp_path / "uninterrupted", tmp_path / "killed"]
    for folder in folders:
        folder.mkdir()
    expected = summary(ranks(folders[0], *settings))
    whole = last_checkpoint(folders[0])
    assert ranks(folders[1], *settings, killed_at=5).returncode != 0
    found = summary(ranks(folders[1], *settings, "resume=auto"))
    (log,) = folders[1].glob("outputs/*/*/run.log")
    steps = [int(step) for step in re.findall(r"step (\d)/6  loss", log.read_text())]
    assert steps == [1, 2, 3, 4, 5, 4, 5, 6], "it went on from the checkpoint of step 3"
    for name in ("final_loss", "final_valid_loss", "bleu", "expert_similarity"):
        assert found[name] == expected[name], name
    assert losses(last_checkpoint(folders[1])) == losses(whole)
    weights, again = (
        safetensors.torch.load_file(path / "model.safetensors") for path in (whole, last_checkpoint(folders[1]))
    )
    assert [name for name in weights if not torch.equal(weights[name], again[name])] == []
    _loads_into_one_process(weights, tmp_path)


def _loads_into_one_process(weights: dict[str, torch.Tensor], folder: Path) -> None:
    config = load(compose("train", ["experiment=quartet/demo", "debug=smoke", "data.max_eval=4"]))
    model = quartet.build(config, build_task(config, folder), moe=True)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert not [name for name in missing if "experts" in name]
    experts = [value for name, value in weights.items() if name.endswith("experts.up.weight")]
    assert experts
    assert all(len(value) == 4 and len({float(part.double().sum()) for part in value}) == 4 for value in experts)


def test_a_number_of_ranks_that_was_not_started_is_an_error(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.train", *DEMO]
    environment = {**ENVIRONMENT, "HOME": str(tmp_path)}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1
    assert "cluster.num_ranks: got 2, but 1 rank(s) were started; start that many with: torchrun" in run.stderr
    assert "Traceback" not in run.stderr
