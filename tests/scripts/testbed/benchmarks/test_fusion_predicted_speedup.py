"""The paper's bars beside ours, and how the two are compared."""

from pathlib import Path

import pytest

from configs.schema import load
from scripts.testbed.benchmarks import fusion_predicted_speedup as module
from scripts.testbed.benchmarks.fusion_paper import bars
from scripts.testbed.launch import Run, compose


def case(
    label: str, *, fused_us: float, paper: float | None, unfused_us: tuple[float, ...] = (20.0, 4.0)
) -> module.Case:
    return module.Case(
        device="a100",
        shape=label,
        label=label,
        group="gemm",
        fused_us=fused_us,
        nested_us=fused_us,
        unfused_us=unfused_us,
        is_mbci=True,
        schedule="",
        paper={} if paper is None else {module.OURS: paper},
    )


def test_no_kernel_is_shorter_than_it_takes_to_start_one() -> None:
    one = case("G1", fused_us=1.0, paper=None)
    assert one.speedup == (20.0 + module.EAGER_US) / module.LAUNCH_US
    assert one.busy_speedup == 24.0


def test_rank_correlation_is_of_the_shapes_with_a_bar() -> None:
    falling = [case(f"G{i}", fused_us=float(i + 3), paper=10.0 - i) for i in range(4)]
    assert module.rank_correlation([*falling, case("X", fused_us=0.1, paper=None)]) == 1.0
    assert module.rank_correlation(falling[:2]) is None


@pytest.mark.parametrize("device", ["a100", "rtx3080"])
def test_the_picture_has_a_bar_of_ours_for_every_shape(device: str) -> None:
    assert list(bars(device, "gemm")) == [f"G{i}" for i in range(1, 13)]
    assert list(bars(device, "attention")) == [f"S{i}" for i in range(1, 10)]
    assert all(module.OURS in found for group in ("gemm", "attention") for found in bars(device, group).values())
    assert "FlashAttention" not in bars(device, "attention")["S7"]
    assert bars("h100", "gemm") == {}


def test_every_shape_is_planned_fused_and_unfused(tmp_path: Path) -> None:
    config = load(compose("bench", ["experiment=fusion/predicted_speedup", "debug=smoke"]))
    outcome = module.bench(config, Run(folder=tmp_path, rank=0))
    assert outcome.kind == "simulated"
    ours = {row.metric for row in outcome.rows if row.provider == "a100_MCFuser"}
    assert {"speedup_G1", "speedup_ViT-Base/16", "fused_time_G1"} <= ours
    assert {row.kind for row in outcome.rows if "paper" in row.provider} == {"paper"}
