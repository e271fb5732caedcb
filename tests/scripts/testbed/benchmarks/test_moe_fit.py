"""The search, what it minimises, and the device file that came of it."""

import pytest

from configs.schema import load
from moe_pipeline.plan.device import load_device
from scripts.testbed.benchmarks import moe_fit, moe_paper
from scripts.testbed.benchmarks.moe_fit import Unknowns
from scripts.testbed.launch import Run, compose


def test_the_simplex_finds_a_minimum() -> None:
    found = moe_fit.nelder_mead(lambda xs: (xs[0] - 3) ** 2 + 10 * (xs[1] + 1) ** 2, [0.0, 0.0], 1.0, 120)
    assert abs(found[0] - 3) < 1e-4
    assert abs(found[1] + 1) < 1e-4


def test_the_committed_device_is_the_published_cluster_with_fitted_unknowns() -> None:
    device = load_device("a100_hdr")
    unknowns = Unknowns(
        product_flops=device.product.points[0][1],
        product_latency_us=device.product.latency_us,
        slow_below_bytes=device.node_message.points[1][0],
        outside_us=device.outside.latency_us,
    )
    assert moe_fit.cluster(unknowns) == device


def test_the_committed_device_meets_figure_12() -> None:
    speeds = moe_fit.figure_12(load_device("a100_hdr"))
    assert max(map(abs, moe_fit.speed_errors(speeds).values())) <= 0.05
    assert not any(moe_fit.order_violations(speeds).values())


def test_the_committed_device_is_a_minimum_of_the_loss() -> None:
    device = load_device("a100_hdr")
    best = moe_fit.loss(device)
    for share in (0.9, 1.1):
        worse = moe_fit.with_products(device, share * device.product.points[0][1])
        assert moe_fit.loss(worse) > best


def test_figure_12s_own_speeds_have_no_errors() -> None:
    printed = {b: {1: 1.0, **speeds} for b, speeds in moe_paper.SPEED_OVER_ONE_CHUNK.items()}
    assert not any(moe_fit.speed_errors(printed).values())
    assert not any(moe_fit.order_violations(printed).values())


def test_another_fastest_number_is_a_violation() -> None:
    printed = {b: {1: 1.0, **speeds} for b, speeds in moe_paper.SPEED_OVER_ONE_CHUNK.items()}
    printed[4096] = {**printed[4096], 8: 1.2}
    assert moe_fit.order_violations(printed)[4096] > 0.1


def test_a_short_run_repeats_itself_and_writes_a_device(tmp_path_factory: pytest.TempPathFactory) -> None:
    config = load(compose("tune", ["experiment=moe_pipeline/fit_a100", "debug=smoke"]))
    folders = [tmp_path_factory.mktemp("run") for _ in range(2)]
    outcomes = [moe_fit.tune(config, Run(folder=folder, rank=0)) for folder in folders]
    assert outcomes[0].rows == outcomes[1].rows
    assert outcomes[0].kind == "simulated"
    assert load_device(folders[0] / "a100_hdr.json") == load_device(folders[1] / "a100_hdr.json")
