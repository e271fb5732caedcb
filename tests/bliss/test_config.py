import dataclasses

import pytest

from bliss import BlissConfig


def test_defaults_are_the_definitions_starting_point() -> None:
    config = BlissConfig()
    assert (config.mode, config.weight, config.shuffle_range, config.replace_ratio) == ("clean", 0.1, 3, 0.1)
    assert (config.temperature, config.max_displacement, config.corrector_layers) == (1.0, 10, 1)


def test_is_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        BlissConfig().weight = 1.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        BlissConfig("clean")  # type: ignore[misc]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mode", "noisy"),
        ("replace_by", "random"),
        ("target", "one_head"),
        ("token_slots", "none"),
        ("corrector_layers", 3),
        ("weight", -0.1),
        ("weight", float("inf")),
        ("weight", float("nan")),
        ("weight", "0.1"),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("shuffle_range", -1),
        ("shuffle_range", 2.5),
        ("shuffle_range", 1024),
        ("max_displacement", 0),
        ("replace_ratio", 1.01),
        ("replace_ratio", float("nan")),
        ("replace_ratio", None),
        ("label_smoothing", -0.01),
        ("ramp_steps", 0),
        ("ramp_steps", 10.0),
    ],
)
def test_rejects_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"BlissConfig\.{field} is {value!r}; it must be"):
        BlissConfig(**{field: value})  # type: ignore[arg-type]
