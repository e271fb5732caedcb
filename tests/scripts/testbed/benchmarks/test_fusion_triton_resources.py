"""The experiment, shrunk: winners fit, do not spill and are right, and the summary counts what the rows say."""

from pathlib import Path

import pytest

from configs.schema import load
from scripts.testbed.benchmarks import fusion_triton_resources as module
from scripts.testbed.benchmarks.fusion_estimates import Estimate
from scripts.testbed.launch import Outcome, Run, compose

SMALL = ["experiment=fusion/triton_resources", "debug=smoke", "bench.kernels.devices=[a100,mi300]",
         "bench.kernels.shapes=[Mixer-Small/32-S]", "bench.kernels.num_compiled=3"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resources")


@pytest.fixture(scope="module")
def outcome(folder: Path) -> Outcome:
    return module.bench(load(compose("bench", SMALL)), Run(folder=folder, rank=0))


def test_winners_fit_do_not_spill_and_are_right(outcome: Outcome) -> None:
    assert outcome.kind == "measured"
    summary = outcome.summary
    assert (summary["fits_everywhere"], summary["spilled_kernels"], summary["interpreter_failures"]) == (1, 0, 0)
    assert (summary["winners"], summary["compiled_candidates"]) == (2, 4), "two of each device, for three asked for"
    assert summary["gradient_kernels"] == 2 * (3 + 1), "of the three inputs, and one that saves a log-sum-exp"
    assert (summary["gradient_fits_everywhere"], summary["gradient_spilled_kernels"]) == (1, 0)
    figures = {(row.provider, row.metric): row.value for row in outcome.rows}
    for device, limit in (("a100", 166912), ("mi300", 65536)):
        assert 0 < figures[device, "shared_Mixer-Small/32-S"] <= limit
        assert 0 < figures[device, "registers_Mixer-Small/32-S"] <= 512
    assert {row.kind for row in outcome.rows if row.metric == "time_Mixer-Small/32-S"} == {"simulated"}


def test_a_second_run_in_the_folder_compiles_nothing(outcome: Outcome, folder: Path) -> None:
    before = (folder / "compiled.jsonl").read_text(encoding="utf-8")
    again = module.bench(load(compose("bench", SMALL)), Run(folder=folder, rank=0))
    assert (folder / "compiled.jsonl").read_text(encoding="utf-8") == before
    assert again.summary == outcome.summary
    assert again.rows == outcome.rows


def test_the_summary_counts_both_kinds_of_mistakes_and_leaves_out_what_did_not_compile() -> None:
    one = Estimate(device="a100", limit=100, estimated=80, operands=50, compiled=90)
    estimates = [
        one,
        Estimate(device="a100", limit=100, estimated=120, operands=50, compiled=90),
        Estimate(device="a100", limit=100, estimated=90, operands=110, compiled=110),
        Estimate(device="a100", limit=100, estimated=110, operands=130, compiled=110),
        Estimate(device="a100", limit=100, estimated=110, operands=130, compiled=None),
    ]
    summary = module._summary([], estimates, ["a kernel"])
    assert (summary["compiled_candidates"], summary["not_compiled_in_time"]) == (4, 1)
    assert (summary["wrongly_refused"], summary["wrongly_accepted"], summary["fitting_candidates"]) == (1, 1, 2)
    assert summary["shared_estimate_right"] == 0.5
    assert summary["operands_estimate_right"] == 1.0
    assert summary["rule_4_right"] == 0.75
    assert summary["interpreter_failures"] == 1
    (row,) = [row for row in module._error_rows(estimates) if row.metric == "shared_estimate_exact"]
    assert (row.provider, row.value) == ("a100", 0.25)
