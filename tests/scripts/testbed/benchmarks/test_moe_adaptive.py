"""The oracle is the best fixed choice of each case, and the search is charged for what it spent beyond it."""

from scripts.testbed.benchmarks.moe_adaptive import Visit, _order, _summary, oracle

FIXED = ({1: 10.0, 2: 8.0, 4: 9.0}, {1: 12.0, 2: 20.0, 4: 9.0}, {1: 11.0, 2: 8.0, 4: 30.0})


def _visit(link: str, tokens: int, fixed: dict[int, float], steps: tuple[float, ...], trial: bool = False) -> Visit:
    return Visit(
        link=link,
        tokens=tokens,
        steps_us=steps,
        chunks=(2,) * len(steps),
        trials=(trial,) * len(steps),
        fixed_us=fixed,
    )


VISITS = [
    *(_visit("a", 64, fixed, (8.0, 8.0)) for fixed in FIXED),
    _visit("b", 64, {1: 5.0, 2: 6.0, 4: 7.0}, (6.0, 6.0), trial=True),
]


def test_the_oracle_is_the_best_median_of_a_link_and_batch() -> None:
    assert oracle(VISITS) == {("a", 64): (2, 8.0), ("b", 64): (1, 5.0)}


def test_regret_and_overhead_are_against_the_oracle() -> None:
    summary = _summary(VISITS)
    spent, ideal = 6 * 8.0 + 2 * 6.0, 6 * 8.0 + 2 * 5.0
    assert summary["regret_vs_oracle"] == spent / ideal
    assert summary["search_overhead"] == 2 * (6.0 - 5.0) / spent
    assert (summary["steps"], summary["trial_steps"]) == (8, 2)
    assert summary["speedup_vs_n1"] == (2 * (10.0 + 12.0 + 11.0) + 2 * 5.0) / spent


def test_every_link_sees_every_batch_about_equally_often() -> None:
    argument = {"seed": 1, "batch_tokens": [64, 128, 256], "links_mbit": [500, 0], "repeats": 7}
    order = list(_order(argument))
    assert [number for number, (link, _) in enumerate(order) if link is not None] == [0, 7]
    for start in (0, 7):
        batches = [tokens for _, tokens in order[start : start + 7]]
        counts = [batches.count(tokens) for tokens in argument["batch_tokens"]]  # type: ignore[attr-defined]
        assert max(counts) - min(counts) <= 1
    assert order == list(_order(argument)), "the same on every rank"
