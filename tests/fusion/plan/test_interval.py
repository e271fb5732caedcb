from hypothesis import given
from hypothesis import strategies as st

from fusion import gemm_chain
from fusion.plan.interval import interval, upper_end


def test_intervals_end_at_powers_of_two_and_half_way():
    assert [upper_end(size) for size in (0, 1, 16, 17, 33, 49, 64, 65, 97, 500)] == [
        16,
        16,
        16,
        32,
        48,
        64,
        64,
        96,
        128,
        512,
    ]


@given(st.integers(1, 100_000))
def test_a_size_is_inside_its_interval_and_the_end_is_its_own(size):
    end = upper_end(size)
    assert size <= end == upper_end(end)
    assert end <= max(16, 2 * size)


def test_chains_of_one_interval_share_their_plan():
    first, second = gemm_chain(M=500, N=100, K=64, H=33, batch=3), gemm_chain(M=399, N=128, K=64, H=48, batch=4)
    assert interval(first) == interval(second)
    assert interval(first).sizes == {"Z": 4, "M": 512, "N": 128, "K": 64, "H": 48}
