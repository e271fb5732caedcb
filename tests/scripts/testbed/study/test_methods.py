import pytest

from configs.typed import ConfigError
from omoe import OMoEConfig
from scripts.testbed.study.methods import METHODS, Method, parse


def test_a_name_alone_and_with_settings() -> None:
    assert parse("adamw") == Method()
    assert parse("expert_lr:factor=0.1,lr=2e-4") == Method(expert_lr=0.1, lr=2e-4)
    assert parse("omoe_input:alpha=1.0,period=4").omoe == OMoEConfig(space="input", alpha=1.0, period=4)
    assert parse("simbal:weight=0.5") == Method(loss="router_similarity", weight=0.5)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_defaults(name: str) -> None:
    parse(name)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("adam", "got 'adam'.*adamw"),
        ("adamw:lr", "key=value"),
        ("adamw:lr=fast", "above 0"),
        ("adamw:factor=2", "factor"),
        ("omoe:period=0", "period=0"),
        ("omoe:alpha=2.0", "space='update'"),
    ],
)
def test_what_is_wrong_is_named(text: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        parse(text)
