import pytest

from omoe import OMoEConfig


def test_defaults_are_the_update_space_with_every_step_orthogonal() -> None:
    config = OMoEConfig()
    assert (config.space, config.period, config.first_orthogonal_step, config.linears) == ("update", 1, 0, "both")


@pytest.mark.parametrize(
    "fields",
    [
        {"space": "output"},
        {"combine": "sum", "space": "input"},
        {"side": "left", "space": "input"},
        {"source": "outputs", "space": "input"},
        {"combine": "load", "space": "input", "source": "weights"},
        {"combine": "load", "space": "input", "source": "gradients"},
        {"alpha_decay": 0.0, "space": "input"},
        {"alpha_decay": 2.0, "space": "input", "alpha_steps": 3},
        {"alpha_decay": True, "space": "input"},
        {"alpha_decay": "1", "space": "input"},
        {"alpha_decay": 0.1, "space": "input"},
        {"alpha_steps": 5, "space": "input"},
        {"alpha_steps": 0, "space": "input", "alpha_decay": 0.1},
        {"alpha_steps": 1.5, "space": "input", "alpha_decay": 0.1},
        {"linears": "none"},
        {"period": 0},
        {"period": 1.0},
        {"period": True},
        {"first_orthogonal_step": -1},
        {"alpha": 0.0, "space": "input"},
        {"alpha": float("nan"), "space": "input"},
        {"alpha": float("inf"), "space": "input"},
        {"alpha": "1", "space": "input"},
        {"alpha": True, "space": "input"},
        {"refresh_in_orthogonal": 1, "space": "input"},
    ],
)
def test_bad_fields_are_named(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        OMoEConfig(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fields",
    [
        {"alpha": 1.0},
        {"combine": "union"},
        {"refresh_in_orthogonal": False},
        {"side": "output"},
        {"source": "weights"},
        {"forgetting": 0.5},
        {"alpha_decay": 0.1, "alpha_steps": 9},
    ],
)
def test_input_only_fields_are_refused_for_update(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(fields))}.*space='update'"):
        OMoEConfig(period=4, **fields)  # type: ignore[arg-type]
    assert OMoEConfig(space="input", period=4, **fields).space == "input"  # type: ignore[arg-type]


def test_a_schedule_that_never_refreshes_is_refused() -> None:
    with pytest.raises(ValueError, match="refresh_in_orthogonal=False"):
        OMoEConfig(space="input", refresh_in_orthogonal=False)
    assert OMoEConfig(space="input", refresh_in_orthogonal=False, first_orthogonal_step=5).period == 1


def test_alpha_decays_with_progress_as_owm_does() -> None:
    config = OMoEConfig(space="input", alpha=2.0, alpha_decay=1e-4, alpha_steps=10)
    assert [config.alpha_at(step) for step in (0, 5, 10, 99)] == [2.0, 2.0 * 1e-4**0.5, 2.0 * 1e-4, 2.0 * 1e-4]
    assert OMoEConfig(space="input", alpha=3.0).alpha_at(7) == 3.0
