from dataclasses import dataclass, field
from typing import Literal

import pytest

from configs.typed import ConfigError, accepted_keys, build


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int
    kind: Literal["a", "b", 1] = "a"
    ratio: float = 0.5

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size: got {self.size}, accepts 1 or more")


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner
    names: tuple[str, ...] = ()
    limit: int | None = None
    figures: dict[str, float] = field(default_factory=dict)
    on: bool = False


def test_builds_nested_values_and_keeps_defaults() -> None:
    built = build(Outer, {"inner": {"size": 2, "ratio": 1}, "names": ["x"], "figures": {"a": 1}, "limit": None})
    assert built == Outer(inner=Inner(size=2, ratio=1.0), names=("x",), figures={"a": 1.0})
    assert isinstance(built.inner.ratio, float)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            {"inner": {"size": 1, "sise": 2}},
            r"inner\.sise: unknown key; inner accepts kind, ratio, size; did you mean size",
        ),
        ({"inner": {}}, r"inner\.size: missing; accepts an integer"),
        ({"inner": {"size": "2"}}, r"inner\.size: got '2' \(str\), accepts an integer"),
        ({"inner": {"size": True}}, r"inner\.size: got True \(bool\), accepts an integer"),
        ({"inner": {"size": 2.0}}, r"inner\.size: got 2\.0 \(float\)"),
        ({"inner": {"size": 0}}, r"inner: size: got 0, accepts 1 or more"),
        ({"inner": {"size": 1, "kind": "c"}}, r"inner\.kind: got 'c' \(str\), accepts one of a, b, 1"),
        ({"inner": {"size": 1, "kind": True}}, r"inner\.kind: got True"),
        ({"inner": 3}, r"inner: got 3, accepts a mapping"),
        ({"inner": {"size": 1}, "names": "x"}, r"names: got 'x' \(str\), accepts a list of a string"),
        ({"inner": {"size": 1}, "names": [1]}, r"names\[0\]: got 1"),
        ({"inner": {"size": 1}, "limit": "many"}, r"limit: got 'many' \(str\), accepts an integer"),
        ({"inner": {"size": 1}, "figures": {"a": "x"}}, r"figures\.a: got 'x'"),
        ({"inner": {"size": 1}, "on": 1}, r"on: got 1 \(int\), accepts true or false"),
        ([], r"the configuration: got \[\], accepts a mapping"),
    ],
)
def test_errors_name_the_key_what_came_and_what_is_accepted(value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(Outer, value)


def test_accepted_keys_follow_a_path() -> None:
    assert accepted_keys(Outer, ["inner"]) == ["size", "kind", "ratio"]
    assert accepted_keys(Outer, ["limit"]) is None
    assert accepted_keys(Outer, ["nowhere"]) is None
