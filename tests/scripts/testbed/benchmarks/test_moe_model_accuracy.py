"""A choice agrees where the simulator's favourite is measured about as fast as the fastest."""

from scripts.testbed.benchmarks.moe_model_accuracy import Case, _summary, agreements


def _case(num_chunks: int, measured_us: float, predicted_us: float, tokens: int = 64) -> Case:
    return Case(
        link="a", tokens=tokens, restore="none", num_chunks=num_chunks, measured_us=measured_us,
        predicted_us=predicted_us,
    )  # fmt: skip


GOOD = [_case(1, 100.0, 100.0), _case(2, 90.0, 99.0), _case(4, 92.0, 80.0)]
BAD = [_case(1, 100.0, 70.0, tokens=128), _case(2, 50.0, 75.0, tokens=128)]


def test_agreement_is_by_measured_time_not_by_name() -> None:
    assert agreements(GOOD) == [True], "n=4 is preferred and measured 2 % above n=2"
    assert agreements(BAD) == [False]
    assert agreements([*GOOD, *BAD]) == [True, False]


def test_errors_are_relative_to_what_was_measured() -> None:
    summary = _summary([*GOOD, *BAD])
    assert (summary["cases"], summary["choice_agreement"]) == (5, 0.5)
    assert summary["median_error"] == abs(80.0 / 92.0 - 1)
    assert summary["p90_error"] == 0.5
