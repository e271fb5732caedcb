"""The papers' numbers agree with what the papers say of them in words."""

import statistics

from scripts.testbed.benchmarks import moe_paper


def mean(name: str) -> float:
    return round(statistics.mean(moe_paper.SPEED_OVER_FASTMOE[name]), 2)


def test_figure_8_has_the_means_of_the_facts() -> None:
    assert [mean(name) for name in moe_paper.SPEED_OVER_FASTMOE] == [1.19, 2.07, 2.26, 1.78]


def test_the_papers_selector_is_right_in_eleven_of_twelve_cases() -> None:
    best = {case: min(bars, key=bars.__getitem__) for case, bars in moe_paper.OVERHEAD_PERCENT.items()}
    assert sum(best[case] == moe_paper.CHOSEN[case] for case in best) == 11


def test_chunks_by_batch() -> None:
    kilo = moe_paper.K
    assert [moe_paper.paper_chunks(b * kilo) for b in (4, 8, 16, 22, 31)] == [2, 4, 4, 4, 8]
