import pytest
import yaml

from configs.schema import load
from configs.typed import ConfigError
from scripts.testbed.launch import compose
from scripts.testbed.objectives import FOLDER, names, with_objective


@pytest.mark.parametrize("name", names())
def test_is_what_the_command_line_makes_of_its_file(name: str) -> None:
    base = load(compose("train", ["experiment=bliss/multi30k"]))
    chosen = load(compose("train", ["experiment=bliss/multi30k", f"objective={name}"]))
    assert with_objective(base, name) == chosen
    assert chosen.comparison.method == name
    assert with_objective(chosen, "plain").bliss.enabled is False


def test_the_plain_one_comes_first_and_each_file_says_what_it_is() -> None:
    assert names()[0] == "plain"
    for name in names():
        header, comment = (FOLDER / f"{name}.yaml").read_text().splitlines()[:2]
        assert header == "# @package _global_"
        assert comment.startswith("# ")
        assert set(yaml.safe_load((FOLDER / f"{name}.yaml").read_text())) <= {"comparison", "bliss", "rival"}


def test_names_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"objective: got 'rdrop', accepts .*did you mean r_drop"):
        with_objective(load(compose("train", ["experiment=bliss/multi30k"])), "rdrop")
