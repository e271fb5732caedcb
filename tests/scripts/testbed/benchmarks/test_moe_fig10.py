"""The 36 bars of the figure to three decimals, and the ledger against equation 6."""

from fractions import Fraction

import pytest

from configs.schema import load
from scripts.testbed.benchmarks import moe_fig10
from scripts.testbed.launch import Outcome, Run, compose


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    config = load(compose("bench", ["experiment=moe_pipeline/fig10"]))
    return moe_fig10.bench(config, Run(folder=tmp_path_factory.mktemp("fig10"), rank=0))


def test_the_bars_to_three_decimals(outcome: Outcome) -> None:
    bars = moe_fig10.bars()
    assert len(bars) == 36
    for bar in bars:
        width = {"MoE-GPT3-S": 768, "MoE-BERT-L": 1024, "MoE-GPT3-XL": 2048}[bar.model]
        n, b = Fraction(bar.num_chunks), Fraction(bar.num_tokens)
        single = 6 * (1 - 1 / n) / (8 + 16 * width / b)
        saved = 2 * b * (2 * width * (n - 2) / n + 4 * width * (n - 1) / n)
        double = saved / (4 * (64 * width + 8 * width * width) + 16 * b * width)
        assert round(bar.figure, 3) == round(float(single), 3)
        assert round(bar.equation_6, 3) == round(float(double), 3)


def test_the_runtime_reaches_the_paper_where_it_keeps_least(outcome: Outcome) -> None:
    for num_chunks in (2, 4, 8):
        achieved = outcome.summary[f"achieved_s3_n{num_chunks}"]
        assert achieved >= outcome.summary[f"paper_achieved_n{num_chunks}"]  # type: ignore[operator]
