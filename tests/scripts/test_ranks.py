"""The same verb on two gloo ranks: both train on one sequence of batches, and the first writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.testbed.checkpoints import damage
from scripts.testbed.rows import REPOSITORY

ENVIRONMENT = {
    "PYTHONPATH": str(REPOSITORY),
    "PATH": "/usr/bin:/bin",
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
}
DEMO = ["experiment=quartet/demo", "debug=smoke", "cluster=cpu_2ranks", "baselines=[]"]


@pytest.mark.parametrize(
    "settings", [["omoe.space=input"], ["trainer.deepspeed=zero2", "omoe=off"]], ids=["DDP with OMoE", "ZeRO-2"]
)
def test_two_ranks_train_as_one_run(settings: list[str], tmp_path: Path) -> None:
    launcher = ["torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command = [sys.executable, "-m", *launcher, "--rdzv-endpoint", "localhost:0", "-m", "scripts.train"]
    environment = {**ENVIRONMENT, "HOME": str(tmp_path), "DS_ACCELERATOR": "cpu"}
    run = subprocess.run(
        [*command, *DEMO, *settings], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [line for line in run.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 1
    assert json.loads(lines[0])["summary"]["final_loss"] > 0
    assert len(list(tmp_path.glob("outputs/*/*"))) == 1
    (checkpoint,) = tmp_path.glob("outputs/*/*/checkpoints/checkpoint-6")
    assert {"model.safetensors", "rng_state_0.pth", "rng_state_1.pth"} <= set(os.listdir(checkpoint))
    assert damage(checkpoint) is None


def test_a_number_of_ranks_that_was_not_started_is_an_error(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.train", *DEMO]
    environment = {**ENVIRONMENT, "HOME": str(tmp_path)}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1
    assert "cluster.num_ranks: got 2, but 1 rank(s) were started; start that many with: torchrun" in run.stderr
    assert "Traceback" not in run.stderr
