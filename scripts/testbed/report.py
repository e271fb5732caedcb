"""One self-contained page per run: what ran, on what, its figures and plots."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import yaml

if TYPE_CHECKING:
    from configs.schema import Config
    from scripts.testbed.rows import Result

TEMPLATE = Path(__file__).with_name("report.html.j2")


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells as text, under headers."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page: a title, a note, plots and a table."""

    title: str
    note: str = ""
    plots: tuple[str, ...] = ()
    """Pictures as SVG text."""
    table: Table | None = None


def render(config: "Config", result: "Result", sections: tuple[Section, ...]) -> str:
    """The page as HTML that needs nothing but itself.

    Args:
        config: The run's configuration, shown whole.
        result: Its rows and headline figures.
        sections: What the verb has to show, in order.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["figure"] = figure
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    configuration = yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False)
    return template.render(config=config, result=result, sections=sections, configuration=configuration)


def figure(value: object) -> str:
    """A figure with as many digits as it deserves."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value
