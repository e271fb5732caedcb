"""The formulas beside the table that was worked out by hand, and their limits."""

import pytest

from scripts.testbed.benchmarks import moe_equations, moe_paper
from scripts.testbed.benchmarks.moe_memory import PAPER_WIDTHS

BY_HAND = {
    ("MoE-GPT3-S", 4): ((0.18, 0.36, 0.45), (0.27, 0.41, 0.48)),
    ("MoE-GPT3-S", 32): ((0.24, 0.48, 0.60), (0.36, 0.54, 0.63)),
    ("MoE-BERT-L", 4): ((0.17, 0.33, 0.42), (0.25, 0.38, 0.44)),
    ("MoE-BERT-L", 32): ((0.24, 0.47, 0.59), (0.35, 0.53, 0.62)),
    ("MoE-GPT3-XL", 4): ((0.13, 0.25, 0.31), (0.19, 0.28, 0.33)),
    ("MoE-GPT3-XL", 32): ((0.22, 0.44, 0.56), (0.33, 0.50, 0.58)),
}


@pytest.mark.parametrize(("model", "kilo"), BY_HAND)
def test_both_formulas_give_the_table(model: str, kilo: int) -> None:
    width, tokens = PAPER_WIDTHS[model], kilo * moe_paper.K
    double = [moe_equations.saving_ratio(tokens, width, 4 * width, 64, n) for n in (2, 4, 8)]
    single = [moe_equations.single_buffer_saving_ratio(tokens, width, n) for n in (2, 4, 8)]
    for found, by_hand in zip((double, single), BY_HAND[model, kilo], strict=True):
        assert all(abs(ours - hand) < 0.01 for ours, hand in zip(found, by_hand, strict=True)), found


def test_limits_of_large_batches() -> None:
    huge = 10**12
    assert [round(moe_equations.saving_ratio(huge, 768, 3072, 64, n), 3) for n in (2, 4, 8)] == [0.25, 0.5, 0.625]
    limits = [moe_equations.single_buffer_saving_ratio(huge, 768, n) for n in (2, 4, 8)]
    assert [round(100 * limit, 1) for limit in limits] == [37.5, 56.2, 65.6]


def test_one_chunk_saves_nothing_with_single_buffers() -> None:
    assert moe_equations.single_buffer_saving_ratio(4096, 768, 1) == 0
