"""Bytes by hand for one schedule, and what must hold between the ways to run a chain."""

from pathlib import Path

import pytest

from configs.schema import load
from configs.typed import ConfigError
from fusion import gemm_chain
from fusion.plan.schedule import schedule
from scripts.testbed.benchmarks import fusion_traffic
from scripts.testbed.benchmarks.fusion_plans import moved
from scripts.testbed.launch import Outcome, Run, compose


def bench(folder: Path, *overrides: str) -> Outcome:
    config = load(compose("bench", ["experiment=fusion/traffic", "debug=smoke", *overrides]))
    return fusion_traffic.bench(config, Run(folder=folder, rank=0))


def test_bytes_by_hand() -> None:
    """M=100 in tiles of 32 makes 4 blocks along m and, with H=64 in 32, 2 along h: A is read by 2, B by 8, D by 4."""
    chain = gemm_chain(M=100, N=96, K=48, H=64, dtype="fp16")
    one = schedule(chain, "mhnk", {"M": 32, "N": 32, "K": 48, "H": 32})
    assert moved(chain, one) == 2 * (2 * 100 * 48 + 8 * 48 * 96 + 4 * 96 * 64 + 100 * 64)


def test_the_chosen_kernels_move_no_more_than_in_the_naive_placement(tmp_path: Path) -> None:
    outcome = bench(tmp_path)
    moved_bytes = {(row.provider, row.metric): row.value for row in outcome.rows if row.metric.startswith("moved_")}
    for shape in ("G1", "ViT-Base/16"):
        fused, naive = (moved_bytes[f"a100_{way}", f"moved_{shape}"] for way in ("fused", "naive_placement"))
        assert 0 < fused <= naive


def test_an_unknown_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"bench\.kernels\.shapes: got 'G13'"):
        bench(tmp_path, "bench.kernels.shapes=[G13]")
