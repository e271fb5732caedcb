"""The same verb on two gloo ranks: both train on one sequence of batches, and the first writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

from scripts.testbed.rows import REPOSITORY

ENVIRONMENT = {
    "PYTHONPATH": str(REPOSITORY),
    "PATH": "/usr/bin:/bin",
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
}
DEMO = ["experiment=quartet/demo", "debug=smoke", "cluster=cpu_2ranks", "baselines=[]"]


def test_two_ranks_train_and_continue_as_one_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0",
               "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "scripts.train", *DEMO]  # fmt: skip
    environment = {**ENVIRONMENT, "HOME": str(tmp_path)}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [line for line in run.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 1
    assert json.loads(lines[0])["summary"]["final_loss"] > 0
    assert len(list(tmp_path.glob("outputs/*/*"))) == 1
    (checkpoint,) = tmp_path.glob("outputs/*/*/checkpoints/checkpoint-6")
    assert {"rng_state_0.pth", "rng_state_1.pth", "manifest.json"} <= set(os.listdir(checkpoint))


def test_a_number_of_ranks_that_was_not_started_is_an_error(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.train", *DEMO]
    environment = {**ENVIRONMENT, "HOME": str(tmp_path)}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1
    assert "cluster.num_ranks: got 2, but 1 rank(s) were started; start that many with: torchrun" in run.stderr
    assert "Traceback" not in run.stderr
