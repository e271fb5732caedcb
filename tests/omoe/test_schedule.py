from hypothesis import given
from hypothesis import strategies as st

from omoe.schedule import Cycles


def phases(schedule: Cycles, num_steps: int) -> str:
    return "".join(schedule.phase(step)[0] for step in range(num_steps))


def test_cycles_and_first_orthogonal_step() -> None:
    assert phases(Cycles(1), 4) == "oooo"
    assert phases(Cycles(4), 9) == "aaaoaaaoa"
    assert phases(Cycles(3, first_orthogonal_step=4), 9) == "aaaaaoaao"


@given(st.integers(1, 20), st.integers(0, 50), st.integers(0, 100))
def test_one_orthogonal_step_a_cycle(period: int, first: int, start: int) -> None:
    schedule = Cycles(period, first_orthogonal_step=first)
    cycle = [schedule.phase(start + first + step) for step in range(period)]
    assert cycle.count("orthogonal") == 1
    assert all(schedule.phase(step) == "accumulating" for step in range(first))
