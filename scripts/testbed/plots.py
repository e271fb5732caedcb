"""Plots as SVG text, drawn without a display."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))
COLORS = (
    "#1f6f8b", "#d1603d", "#5b8c5a", "#8a5a9e", "#b08900", "#555f6b", "#6cb4c9", "#e8a88f", "#a9c9a4", "#c6a6d3",
    "#e0c95e", "#a3324b", "#2f3e8f", "#9aa5b1",
)  # fmt: skip
FEW_NAMES = 4  # more are listed below the axes, where they hide nothing
LEGEND_CHARACTERS = 72  # of small type that fit below the axes
FEW_BARS = 12  # likewise for groups of bars


def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, title: str, x_label: str, y_label: str
) -> str:
    """Lines, one per name, each given as (xs, ys)."""
    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    axes = figure.subplots()
    for color, (name, (xs, ys)) in zip(_cycle(len(series)), series.items(), strict=True):
        axes.plot(xs, ys, label=name, color=color, linewidth=1.6)
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.25)
    _name(figure, len(series))
    return _svg(figure)


def banded_curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float], Sequence[float]]],
    *,
    title: str,
    x_label: str,
    y_label: str,
) -> str:
    """Lines in bands, one per name, each given as (xs, ys, lowest, highest)."""
    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    axes = figure.subplots()
    for color, (name, (xs, ys, low, high)) in zip(_cycle(len(series)), series.items(), strict=True):
        axes.plot(xs, ys, label=name, color=color, linewidth=1.6)
        axes.fill_between(xs, low, high, color=color, alpha=0.2, linewidth=0)
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.25)
    _name(figure, len(series))
    return _svg(figure)


def points(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, title: str, x_label: str, y_label: str
) -> str:
    """Points, one colour per name, each given as (xs, ys), on equal logarithmic axes with the line of equality."""
    figure = Figure(figsize=(4.2, 4.0), layout="constrained")
    axes = figure.subplots()
    for color, (name, (xs, ys)) in zip(_cycle(len(series)), series.items(), strict=True):
        axes.scatter(xs, ys, label=name, color=color, s=14, alpha=0.8)
    values = [value for xs, ys in series.values() for value in (*xs, *ys)]
    axes.plot([min(values), max(values)], [min(values), max(values)], color="#999999", linewidth=0.8)
    axes.set(title=title, xlabel=x_label, ylabel=y_label, xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25)
    _name(figure, len(series))
    return _svg(figure)


def bars(values: Mapping[str, Sequence[float]], *, title: str, x_label: str, y_label: str) -> str:
    """Grouped bars: one group per position, one bar per name."""
    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / max(1, len(values))
    for index, (color, (name, heights)) in enumerate(zip(_cycle(len(values)), values.items(), strict=True)):
        axes.bar(np.arange(len(heights)) + index * width, heights, width, label=name, color=color)
    positions = max(map(len, values.values()), default=0)
    ticks = [str(position) for position in range(positions)]
    axes.set_xticks(np.arange(positions) + 0.4 - width / 2, ticks, fontsize=None if positions <= FEW_BARS else 6)
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(axis="y", alpha=0.25)
    _name(figure, len(values), outside=positions > FEW_BARS)
    return _svg(figure)


def heat_maps(matrices: Mapping[str, Sequence[Sequence[float]]], *, title: str, low: float, high: float) -> str:
    """Square matrices side by side on one colour scale, with their values written in."""
    figure = Figure(figsize=(2.6 * max(1, len(matrices)) + 0.6, 3.0), layout="constrained")
    all_axes = np.atleast_1d(figure.subplots(1, max(1, len(matrices))))
    for axes, (name, matrix) in zip(all_axes, matrices.items(), strict=True):
        image = axes.imshow(np.asarray(matrix), vmin=low, vmax=high, cmap="viridis")
        axes.set_title(name, fontsize=9)
        axes.set_xticks(range(len(matrix)))
        axes.set_yticks(range(len(matrix)))
        for row, column in np.ndindex(len(matrix), len(matrix)):
            value = matrix[row][column]
            dark = value < (low + high) / 2
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="w" if dark else "k", fontsize=7)
    figure.colorbar(image, ax=list(all_axes), shrink=0.8)
    figure.suptitle(title, fontsize=11)
    return _svg(figure)


def timelines(lanes: Mapping[str, Sequence[tuple[str, str, float, float]]], *, title: str) -> str:
    """What ran when: one group of lanes per name, one lane per stream, spans as (stream, label, start, stop) in us."""
    figure = Figure(figsize=(10.4, 1.3 * len(lanes) + 0.9), layout="constrained")
    all_axes = np.atleast_1d(figure.subplots(len(lanes), 1, sharex=True))
    streams = ("compute", "comm", "copy")
    for axes, (name, spans) in zip(all_axes, lanes.items(), strict=True):
        used = [stream for stream in streams if any(span[0] == stream for span in spans)]
        begin = min((span[2] for span in spans), default=0.0)
        for stream, label, start, stop in spans:
            lane = used.index(stream)
            chunk = int(label[len(label.rstrip("0123456789")) :] or 1)
            color = COLORS[(chunk - 1) % len(COLORS)]
            span_ms = ((start - begin) / 1e3, (stop - start) / 1e3)
            axes.broken_barh([span_ms], (lane - 0.4, 0.8), color=color, alpha=0.75, linewidth=0.3, edgecolor="white")
        axes.set_yticks(range(len(used)), used)
        axes.invert_yaxis()
        axes.set_title(name, fontsize=9)
    all_axes[-1].set_xlabel("ms; one colour per chunk")
    figure.suptitle(title, fontsize=11)
    return _svg(figure)


def _name(figure: Figure, count: int, *, outside: bool = False) -> None:
    """Say which colour is whose, if there are several."""
    if count > FEW_NAMES or (outside and count > 1):
        longest = max(len(text) for text in figure.axes[0].get_legend_handles_labels()[1])
        columns = max(1, min(FEW_NAMES - 1, LEGEND_CHARACTERS // (longest + 4)))
        figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
    elif count > 1:
        figure.axes[0].legend(frameon=False, fontsize=8)


def _cycle(count: int) -> list[str]:
    return [COLORS[index % len(COLORS)] for index in range(count)]


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=NO_METADATA)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
