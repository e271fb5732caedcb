import pytest

from configs.schema import load
from scripts.testbed import usage
from scripts.testbed.launch import compose


def test_help_names_every_experiment_of_the_verb_and_every_choice() -> None:
    text = usage.text("train")
    assert "quartet/demo" in text
    assert "moe_pipeline/layer" not in text
    assert "moe_pipeline/layer" in usage.text("bench")
    for group, choices in usage.groups().items():
        assert group in text
        assert all(choice in text for choice in choices)


@pytest.mark.parametrize(
    ("group", "choice"), [(group, choice) for group, choices in usage.groups().items() for choice in choices]
)
def test_every_choice_of_every_group_composes(group: str, choice: str) -> None:
    experiment = "bliss/multi30k" if group == "objective" else "quartet/demo"  # objectives are of comparisons
    chosen = {"experiment": experiment, "bliss": "off", group: choice}
    config = load(compose("train", [f"{name}={value}" for name, value in chosen.items()]))
    assert hasattr(config, {"debug": "smoke", "objective": "comparison"}.get(group, group))
