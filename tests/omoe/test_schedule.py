from hypothesis import given
from hypothesis import strategies as st

from omoe import OMoEConfig
from omoe.schedule import phase, refreshes


def test_cycles_and_first_orthogonal_step() -> None:
    config = OMoEConfig(period=4, first_orthogonal_step=5)
    assert [step for step in range(16) if phase(step, config) == "orthogonal"] == [7, 11, 15]
    assert all(phase(step, OMoEConfig()) == "orthogonal" for step in range(3))


@given(st.integers(1, 20), st.integers(0, 50), st.integers(0, 200))
def test_one_orthogonal_step_a_cycle(period: int, first: int, start: int) -> None:
    config = OMoEConfig(period=period, first_orthogonal_step=first)
    phases = [phase(step, config) for step in range(first + start, first + start + period)]
    assert phases.count("orthogonal") == 1
    assert all(phase(step, config) == "accumulating" for step in range(first))


def test_refreshes_every_step_unless_orthogonal_steps_are_left_out() -> None:
    assert all(refreshes(step, OMoEConfig(space="input", period=2)) for step in range(4))
    config = OMoEConfig(space="input", period=2, refresh_in_orthogonal=False)
    assert [refreshes(step, config) for step in range(4)] == [True, False, True, False]
