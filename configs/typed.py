"""From a plain mapping to a frozen dataclass: unknown keys, wrong types and bad values are errors that name the key."""

import dataclasses
import difflib
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, what it got and what it accepts."""


def build(cls: type[T], value: object, key: str = "") -> T:
    """Make a dataclass from a mapping, checking every key and type on the way down.

    Args:
        cls: A dataclass type.
        value: A mapping of plain values (no config-framework objects).
        key: Where in the configuration this mapping sits, for error messages ("" is the root).

    Returns:
        An instance of `cls`.

    Raises:
        ConfigError: For an unknown or missing key, a value of another type, or a value the dataclass itself refuses.
    """
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key or 'the configuration'}: got {value!r}, accepts a mapping with the keys {_names(cls)}")
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in value:
        if name not in fields:
            raise ConfigError(_unknown(cls, str(name), key))
    arguments = {}
    for name, field in fields.items():
        if name in value:
            arguments[name] = _convert(hints[name], value[name], _join(key, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{_join(key, name)}: missing; accepts {_describe(hints[name])}")
    try:
        return cls(**arguments)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{key or 'the configuration'}: {error}") from error


def accepted_keys(cls: type, path: Sequence[str]) -> list[str] | None:
    """The keys accepted at a dotted path below a dataclass; None where the path leads nowhere or to a plain value."""
    for name in path:
        hint = get_type_hints(cls).get(name)
        candidates = [hint, *get_args(hint)]
        nested = next((candidate for candidate in candidates if dataclasses.is_dataclass(candidate)), None)
        if not isinstance(nested, type):
            return None
        cls = nested
    return _names(cls)


def closest(name: str, accepted: Sequence[str]) -> str:
    """A sentence that lists what is accepted and, where one is near, what was probably meant."""
    near = difflib.get_close_matches(name, accepted, n=1)
    return f"accepts {', '.join(sorted(accepted))}" + (f"; did you mean {near[0]}?" if near else "")


def _convert(hint: Any, value: object, key: str) -> object:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(hint, value, key)
    if origin is Literal:
        if any(value == option and type(value) is type(option) for option in get_args(hint)):
            return value
    elif origin is tuple:
        if isinstance(value, Sequence) and not isinstance(value, str):
            item = get_args(hint)[0]
            return tuple(_convert(item, part, f"{key}[{index}]") for index, part in enumerate(value))
    elif origin is dict:
        if isinstance(value, Mapping):
            item = get_args(hint)[1]
            return {str(name): _convert(item, part, _join(key, str(name))) for name, part in value.items()}
    elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return build(hint, value, key)
    elif hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif hint is types.NoneType:
        if value is None:
            return None
    elif type(value) is hint:
        return value
    raise ConfigError(f"{key}: got {value!r} ({type(value).__name__}), accepts {_describe(hint)}")


def _convert_union(hint: Any, value: object, key: str) -> object:
    options = get_args(hint)
    if value is None and types.NoneType in options:
        return None
    rest = [option for option in options if option is not types.NoneType]
    if len(rest) == 1:
        return _convert(rest[0], value, key)
    for option in rest:
        try:
            return _convert(option, value, key)
        except ConfigError:
            continue
    raise ConfigError(f"{key}: got {value!r} ({type(value).__name__}), accepts {_describe(hint)}")


def _describe(hint: Any) -> str:
    origin = get_origin(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(option) for option in get_args(hint))
    if origin is dict:
        return f"a mapping to {_describe(get_args(hint)[1])}"
    if origin is tuple:
        return f"a list of {_describe(get_args(hint)[0])}"
    if hint is types.NoneType:
        return "null"
    if dataclasses.is_dataclass(hint):
        return f"a mapping with the keys {', '.join(_names(hint))}"
    return {int: "an integer", float: "a number", bool: "true or false", str: "a string"}.get(hint, str(hint))


def _names(cls: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _unknown(cls: type, name: str, key: str) -> str:
    return f"{_join(key, name)}: unknown key; {key or 'the configuration'} {closest(name, _names(cls))}"


def at_least(section: object, low: float, *names: str) -> None:
    """Refuse fields of a section below a bound; None means unset and passes.

    Raises:
        ValueError: Names the field, what it got and the bound.
    """
    for name in names:
        value = getattr(section, name)
        if value is not None and value < low:
            raise ValueError(f"{name}: got {value}, accepts {low} or more")


def share(section: object, *names: str) -> None:
    """Refuse fields outside [0, 1)."""
    for name in names:
        value = getattr(section, name)
        if not 0 <= value < 1:
            raise ValueError(f"{name}: got {value}, accepts a number from 0 up to but not including 1")
