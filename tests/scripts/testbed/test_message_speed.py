"""Points of a speed are such that a device takes them."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from scripts.testbed.message_speed import growing


@given(rates=st.lists(st.floats(1.0, 1e12), min_size=1, max_size=8))
def test_points_are_bent_until_their_times_grow(rates: list[float]) -> None:
    points = [(4.0**position, rate) for position, rate in enumerate(rates)]
    bent = growing(points)
    times = [volume / rate for volume, rate in bent]
    assert all(later >= earlier for earlier, later in itertools.pairwise(times))
    assert all(rate <= given_rate for (_, rate), (_, given_rate) in zip(bent, points, strict=True))
    assert bent[0] == points[0]
