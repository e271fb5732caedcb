"""Methods of a study: what each changes of training a Mixture of Experts with AdamW."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from configs.typed import ConfigError, closest
from omoe import OMoEConfig

LossName = Literal["none", "output_orthogonality", "weight_orthogonality", "router_similarity"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to train."""

    moe: bool = True
    """Whether the trained feed-forward layers become Mixtures of Experts."""
    omoe: OMoEConfig | None = None
    """The orthogonal optimizer around AdamW; None is AdamW alone."""
    expert_lr: float = 1.0
    """Learning rate of the experts' parameters, as a share of the others'."""
    loss: LossName = "none"
    """A loss that is added to keep experts apart."""
    weight: float = 0.0
    """Its weight."""
    lr: float | None = None
    """Peak learning rate; None takes the data set's."""


def _omoe(**fixed: Any) -> Callable[..., Method]:
    return lambda **settings: Method(omoe=OMoEConfig(**{**fixed, **settings}))


def _loss(name: LossName) -> Callable[..., Method]:
    return lambda *, weight=0.01: Method(loss=name, weight=weight)


METHODS: Mapping[str, Callable[..., Method]] = {
    "adamw": lambda: Method(),
    "dense": lambda: Method(moe=False),
    "omoe": _omoe(space="update"),
    "same_length": _omoe(space="update", control="length"),
    "omoe_input": _omoe(space="input"),
    "omoe_union": _omoe(space="input", combine="union"),
    "own": _omoe(space="input", control="own"),
    "random": _omoe(space="input", control="random"),
    "expert_lr": lambda *, factor=0.3: Method(expert_lr=factor),
    "output_orthogonality": _loss("output_orthogonality"),
    "weight_orthogonality": _loss("weight_orthogonality"),
    "simbal": _loss("router_similarity"),
}
"""Name -> the method; settings behind the name are its arguments, and `lr` for any of them."""


def parse(text: str) -> Method:
    """The method of a text such as `adamw` or `omoe:space=input,alpha=1.0`.

    Raises:
        ConfigError: The name or a setting is unknown, or a value is refused.
    """
    name, _, rest = text.partition(":")
    if name not in METHODS:
        raise ConfigError(f"study.methods: got {name!r}, {closest(name, tuple(METHODS))}")
    settings: dict[str, object] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(f"study.methods: got {part!r} in {text!r}, accepts key=value")
        settings[key] = _value(value)
    lr = settings.pop("lr", None)
    try:
        if lr is not None and not (isinstance(lr, int | float) and lr > 0):
            raise ValueError(f"lr: got {lr!r}, accepts a number above 0")
        return dataclasses.replace(METHODS[name](**settings), lr=lr)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"study.methods: {text!r}: {error}") from error


def described(method: Method) -> dict[str, object]:
    """A method as plain values, for records."""
    return dataclasses.asdict(method)


def _value(text: str) -> object:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
