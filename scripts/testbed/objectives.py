"""The training objectives that are compared, by name: the files of configs/objective, one a method."""

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from configs.comparison import RivalSection
from configs.schema import Config
from configs.sections import BlissSection
from configs.typed import ConfigError, build, closest

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "objective"


def names() -> list[str]:
    """All methods, the plain one first."""
    found = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    return sorted(found, key=lambda name: name != "plain")


def with_objective(config: Config, name: str) -> Config:
    """A configuration with another method's objective.

    Args:
        config: The run's configuration; what the method's file does not set is taken from it.
        name: A file of configs/objective.

    Raises:
        ConfigError: There is no such file.
    """
    path = FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(f"objective: got {name!r}, {closest(name, names())}")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return dataclasses.replace(
        config,
        bliss=_section(BlissSection, config.bliss, content.get("bliss", {"enabled": False})),
        rival=_section(RivalSection, config.rival, content.get("rival", {"enabled": False})),
        comparison=dataclasses.replace(config.comparison, method=content["comparison"]["method"]),
    )


def _section(cls: Any, section: Any, changes: dict[str, object]) -> Any:
    return build(cls, {**dataclasses.asdict(section), **changes})
