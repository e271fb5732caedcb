import itertools
import math
import statistics

from closeness import assert_equal_up_to_rounding
from scipy import stats
from torch import tensor

from scripts.testbed.study.statistics import deviation, paired, sign_flip

OWN, OTHER = [3.0, 4.5, 5.0, 7.0, 6.5], [2.0, 4.0, 5.5, 5.0, 6.0]


def test_the_test_is_scipys() -> None:
    found = paired(OWN, OTHER)
    known = stats.ttest_rel(OWN, OTHER)
    interval = known.confidence_interval(0.95)
    for name, own, theirs in (
        ("p", found.p_value, known.pvalue),
        ("low", found.low, interval.low),
        ("high", found.high, interval.high),
    ):
        assert_equal_up_to_rounding(name, tensor([own]).double(), tensor([theirs]).double(), roundings=2**33)
    assert (found.pairs, found.wins, found.losses) == (5, 4, 1)
    assert found.difference == statistics.fmean(a - b for a, b in zip(OWN, OTHER, strict=True))


def test_signs_are_flipped_in_every_way() -> None:
    differences = [1.0, 0.5, -0.5, 2.0]
    observed = abs(sum(differences))
    flips = [
        sum(s * d for s, d in zip(signs, differences, strict=True)) for signs in itertools.product((1, -1), repeat=4)
    ]
    assert sign_flip(differences) == sum(abs(flip) >= observed for flip in flips) / 16
    assert sign_flip([1.0, 2.0, 3.0]) == 2 / 8


def test_equal_figures_show_nothing_and_a_constant_difference_is_certain() -> None:
    assert paired(OWN, OWN).p_value == 1
    assert paired([2.0, 3.0, 4.0], [1.0, 2.0, 3.0]).p_value == 0


def test_what_is_detectable_shrinks_with_pairs() -> None:
    assert paired(OWN * 3, OTHER * 3).detectable < paired(OWN, OTHER).detectable
    assert paired(OWN, OTHER).detectable > paired(OWN, OTHER).high - paired(OWN, OTHER).difference


def test_one_pair_has_a_difference_and_no_more() -> None:
    found = paired([2.0], [1.0])
    assert found.difference == 1
    assert math.isnan(found.p_value)
    assert math.isnan(deviation([1.0]))
