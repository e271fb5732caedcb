import datetime
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from configs.typed import ConfigError
from scripts.testbed.launch import run_folder
from scripts.testbed.rows import REPOSITORY

TODAY = datetime.date.today().isoformat()


def make(outputs: Path, date: str, name: str, *, finished: bool) -> Path:
    folder = outputs / date / name
    (folder / "checkpoints").mkdir(parents=True)
    if finished:
        (folder / "rows.csv").write_text("")
    return folder


def test_a_new_run_gets_a_new_folder_under_todays_date(tmp_path: Path) -> None:
    assert run_folder(tmp_path, "quartet/demo", "off", "train") == tmp_path / TODAY / "quartet_demo"
    assert run_folder(tmp_path, "quartet/demo", "off", "train") == tmp_path / TODAY / "quartet_demo-2"


def test_runs_that_start_at_once_get_a_folder_each(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: run_folder(tmp_path, "quartet/demo", "off", "train"), range(8)))
    assert len(set(found)) == 8
    assert all(folder.is_dir() for folder in found)


def test_auto_continues_the_unfinished_run_of_this_name_and_no_other(tmp_path: Path) -> None:
    make(tmp_path, "2026-01-02", "quartet_demo", finished=True)
    make(tmp_path, "2026-01-02", "quartet_demo_long", finished=False)
    assert run_folder(tmp_path, "quartet/demo", "auto", "train") == tmp_path / TODAY / "quartet_demo"
    unfinished = make(tmp_path, "2026-01-01", "quartet_demo-2", finished=False)
    assert run_folder(tmp_path, "quartet/demo", "auto", "train") == unfinished
    assert run_folder(tmp_path, "quartet/demo", "auto", "bench") == tmp_path / TODAY / "quartet_demo-2"


def test_a_named_run_is_continued_and_must_exist(tmp_path: Path) -> None:
    folder = make(tmp_path, "2026-01-01", "quartet_demo", finished=False)
    assert run_folder(tmp_path, "quartet/demo", str(folder), "train") == folder
    with pytest.raises(ConfigError, match="resume: got 'nowhere', accepts off, auto, or the folder"):
        run_folder(tmp_path, "quartet/demo", "nowhere", "train")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["experiment=quartet/demo", "trainer.max_step=3"], "error: trainer.max_step: unknown key;"),
        (["experiment=quartet/demo", "moe.gate.top_k=5"], "top_k"),
        (["experiment=moe_pipeline/layer"], "python -m scripts.bench experiment=moe_pipeline/layer"),
        (["experiment=nowhere/nothing"], "error: experiment: got 'nowhere/nothing', accepts"),
        (
            [],
            "error: experiment: missing; accepts bliss/debian_synopses, ",
        ),
        (["experiment=quartet/dmo"], "did you mean quartet/demo?"),
    ],
)
def test_a_command_that_cannot_run_ends_with_one_message_and_no_traceback(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    run = verb("train", *arguments, folder=tmp_path)
    assert run.returncode == 1
    assert message in run.stderr
    assert "Traceback" not in run.stderr
    assert run.stdout == ""
    assert not (tmp_path / "outputs").exists()


def test_the_last_line_is_json_and_everything_promised_is_there(tmp_path: Path) -> None:
    run = verb("bench", "experiment=moe_pipeline/layer", "debug=smoke", folder=tmp_path)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["experiment"] == "moe_pipeline/layer"
    assert {row["provider"] for row in result["rows"]} == {"dense", "dense_equal_flops", "moe"}
    folder = tmp_path / "outputs" / TODAY / "moe_pipeline_layer"
    assert {"config.yaml", "run.log", "rows.csv", "report.html"} <= {path.name for path in folder.iterdir()}


def verb(name: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a verb in an empty folder, as a person would."""
    return subprocess.run(
        [sys.executable, "-m", f"scripts.{name}", *arguments],
        cwd=folder,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin", "HOME": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
