from collections.abc import Sequence
from pathlib import Path

import pytest

from scripts.testbed.link import LinkPoint, curve, table
from scripts.testbed.network import Host, shaped_hosts, unavailable

REASON = unavailable()


def check(points: Sequence[LinkPoint], sizes_bytes: Sequence[int]) -> None:
    assert [point.size_bytes for point in points] == list(sizes_bytes)
    for point in points:
        assert 0 < point.low_us <= point.median_us <= point.high_us
        assert point.gbit_per_s > 0


def test_a_point_for_each_size_on_loopback(tmp_path: Path) -> None:
    sizes_bytes = (1, 16 * 1024, 1024)
    points = curve((), num_ranks=2, folder=tmp_path, sizes_bytes=sizes_bytes, repeats=3)
    check(points, sizes_bytes)
    for point in points:  # what a rank sends, by the median time
        bits = point.gbit_per_s * 1e3 * point.median_us
        assert round(bits) == 8 * point.size_bytes


@pytest.mark.netns
@pytest.mark.skipif(REASON is not None, reason=f"no network namespaces here: {REASON}")
def test_a_point_for_each_size_on_a_shaped_link(tmp_path: Path) -> None:
    sizes_bytes = (2**20, 2**14)
    with shaped_hosts(2, rate_mbit=500.0) as hosts:
        points = curve(hosts, num_ranks=2, folder=tmp_path, sizes_bytes=sizes_bytes, repeats=3)
    check(points, sizes_bytes)


def test_the_table_has_a_row_for_each_point() -> None:
    point = LinkPoint(size_bytes=2**20, median_us=8388.608, low_us=8000.0, high_us=9000.0, gbit_per_s=1.0)
    shown = table([point, point])
    assert len(shown.rows) == 2
    assert shown.rows[0] == ("1,024", "8,389", "8,000", "9,000", "1")
    assert len(shown.headers) == len(shown.rows[0])


@pytest.mark.parametrize(
    ("num_ranks", "sizes_bytes", "repeats", "text"),
    [
        (1, (1,), 1, "num_ranks: got 1"),
        (2, (), 1, r"sizes_bytes: got \(\)"),
        (2, (4, 0), 1, r"sizes_bytes: got \(4, 0\)"),
        (2, (1,), 0, "repeats: got 0"),
    ],
)
def test_refuses_what_has_no_curve(
    num_ranks: int, sizes_bytes: tuple[int, ...], repeats: int, text: str, tmp_path: Path
) -> None:
    hosts: tuple[Host, ...] = ()
    with pytest.raises(ValueError, match=text):
        curve(hosts, num_ranks=num_ranks, folder=tmp_path, sizes_bytes=sizes_bytes, repeats=repeats)
