"""Records -> rows, headline figures and the report: what each method scored, against what, and how sure that is."""

import math
import statistics
from collections.abc import Mapping, Sequence

from configs.schema import Config
from scripts.testbed import launch, plots
from scripts.testbed.report import Section, Table, figure
from scripts.testbed.rows import Row
from scripts.testbed.study.diversity import FIGURES, mean_figures
from scripts.testbed.study.record import Record
from scripts.testbed.study.statistics import CONFIDENCE, Paired, deviation, paired

UNITS = {
    "output_cosine": "cosine",
    "response_cosine": "cosine",
    "change_cosine": "cosine",
    "centred_cosine": "cosine",
    "variation": "ratio",
    "change_size": "ratio",
    "load_max": "x equal share",
}
OMOE, CONTROL = "omoe", "same_length"
SIMILARITY = {"similarity": "output_cosine", "change_cosine": "change_cosine", "change_size": "change_size"}

Runs = Mapping[str, Mapping[str, Mapping[int, Record]]]
"""Task -> method -> seed -> its run."""


def outcome(config: Config, records: Sequence[Record], *, data_sha256: str) -> launch.Outcome:
    """What a study found.

    Args:
        config: The run's configuration.
        records: Every finished run.
        data_sha256: Of all its data sets.
    """
    runs: dict[str, dict[str, dict[int, Record]]] = {}
    for record in records:
        runs.setdefault(record.task, {}).setdefault(record.method, {})[record.seed] = record
    first = config.study.methods[0]
    rows = [row for task, methods in runs.items() for name in methods for row in _rows(task, methods, name, first)]
    return launch.Outcome(
        rows=tuple(rows),
        summary=_summary(runs, first),
        data_sha256=data_sha256,
        sections=(*_tables(runs, first, config), *_pictures(runs, first)),
    )


def scores(runs: Mapping[int, Record]) -> tuple[str, dict[int, float]]:
    """The metric a data set is compared by, and its value by seed."""
    metric = next(iter(next(iter(runs.values())).finished.scores))
    return metric, {seed: record.finished.scores[metric] for seed, record in runs.items()}


def compare(own: Mapping[int, float], other: Mapping[int, float]) -> Paired | None:
    """Paired over the seeds that both have; None where they share none."""
    seeds = sorted(own.keys() & other.keys())
    return paired([own[seed] for seed in seeds], [other[seed] for seed in seeds]) if seeds else None


def verdict(found: Paired | None) -> str:
    """In words, at 95 % confidence."""
    if found is None or math.isnan(found.p_value):
        return "not enough pairs"
    if found.p_value < 1 - CONFIDENCE:
        return "better" if found.difference > 0 else "worse"
    return "no difference found"


def _rows(task: str, methods: Mapping[str, Mapping[int, Record]], name: str, first: str) -> list[Row]:
    runs = methods[name]
    found: list[Row] = []

    def add(metric: str, unit: str, value: float, low: float | None = None, high: float | None = None) -> None:
        if math.isfinite(value):
            found.append(Row(provider=name, metric=f"{task}_{metric}", unit=unit, value=value, low=low, high=high))

    add("seeds", "count", float(len(runs)))
    for metric in next(iter(runs.values())).finished.scores:
        values = [record.finished.scores[metric] for record in runs.values()]
        add(metric, "percent", statistics.fmean(values))
        add(f"{metric}_deviation", "percent", deviation(values))
    metric, own = scores(runs)
    for other in (first, CONTROL):
        against = compare(own, scores(methods[other])[1]) if other in methods and other != name else None
        if against is not None and not math.isnan(against.low):
            unit = "percentage points"
            add(f"{metric}_vs_{_plain(other)}", unit, against.difference, against.low, against.high)
            add(f"p_vs_{_plain(other)}", "p-value", against.p_value)
            add(f"p_sign_flip_vs_{_plain(other)}", "p-value", against.p_sign_flip)
            add(f"detectable_vs_{_plain(other)}", unit, against.detectable)
    for name_of, value in _mean_diversity(runs).items():
        add(name_of, UNITS[name_of.removesuffix("_before")], value)
    add("removed_energy", "ratio", statistics.fmean(record.finished.removed_energy for record in runs.values()))
    left = _leftover(runs)
    if left is not None:
        add("leftover", "ratio", left)
    return found


def _leftover(runs: Mapping[int, Record]) -> float | None:
    """Share of the experts' finished steps that lay in the others' subspace, over the seeds that measured it."""
    measured = [record.finished.leftover for record in runs.values() if record.finished.leftover is not None]
    return statistics.fmean(measured) if measured else None


def _mean_diversity(runs: Mapping[int, Record]) -> dict[str, float]:
    """After training, and before as `<figure>_before`; averaged over layers and seeds."""
    after = [mean_figures(record.finished.after) for record in runs.values()]
    before = [mean_figures(record.finished.before) for record in runs.values()]
    found = {}
    for metric in FIGURES:
        for suffix, measured in (("", after), ("_before", before)):
            values = [figures[metric] for figures in measured if metric in figures]
            if values and not (suffix and metric not in ("output_cosine", "variation")):
                found[f"{metric}{suffix}"] = statistics.fmean(values)
    return found


def _diversity_by_seed(runs: Mapping[int, Record], metric: str) -> dict[int, float]:
    measured = {seed: mean_figures(record.finished.after) for seed, record in runs.items()}
    return {seed: figures[metric] for seed, figures in measured.items() if metric in figures}


def _summary(runs: Runs, first: str) -> dict[str, float | int | str | None]:
    """Diversity over all data sets, and for each, in words, whether OMoE beats AdamW and the control."""
    summary: dict[str, float | int | str | None] = {}
    for short, metric in SIMILARITY.items():
        for method, name in ((first, "adamw"), (OMOE, "omoe"), (CONTROL, "control")):
            values = [v for task in runs.values() for v in _diversity_by_seed(task.get(method, {}), metric).values()]
            if values:
                summary[f"{short}_{name}"] = statistics.fmean(values)
    for short in ("similarity", "change_cosine"):
        for other, suffix in ((first, ""), (CONTROL, "_control")):
            pairs = [_pairs(task, SIMILARITY[short], other) for task in runs.values()]
            known = [pair for pair in pairs if pair is not None]
            if known:
                summary[f"{short}{suffix}_lower_pairs"] = sum(pair.losses for pair in known)
                summary[f"{short}{suffix}_pairs"] = sum(pair.pairs for pair in known)
    for task, methods in runs.items():
        if OMOE in methods:
            own = scores(methods[OMOE])[1]
            for other, name in ((first, "adamw"), (CONTROL, "control")):
                if other in methods:
                    found = compare(own, scores(methods[other])[1])
                    summary[f"{task}_omoe_vs_{name}"] = verdict(found)
                    summary[f"{task}_omoe_vs_{name}_p"] = None if found is None else found.p_value
    summary["finished_runs"] = sum(len(seeds) for methods in runs.values() for seeds in methods.values())
    return summary


def _pairs(task: Mapping[str, Mapping[int, Record]], metric: str, other: str) -> Paired | None:
    own, theirs = (_diversity_by_seed(task.get(name, {}), metric) for name in (OMOE, other))
    return compare(own, theirs)


def _tables(runs: Runs, first: str, config: Config) -> list[Section]:
    note = (
        f"Means over seeds +- deviation. Every method starts from the same copies, router, head and order of the data "
        f"for a seed. Differences are from {first} on the same seeds, with 95 % intervals and paired t-tests; "
        "'detectable' is the difference that such a test would find four times out of five. The lower "
        f"{config.study.frozen_layers} layers are frozen and their outputs, without dropout, were computed once. "
        "'Leftover' is the share, in length, of the experts' finished steps that still lay in the other experts' "
        "subspace. "
        f"Scored on {config.study.split}."
    )
    sections = []
    for task, methods in runs.items():
        metric, base = scores(methods[first]) if first in methods else ("", {})
        lines = []
        for name, seeds in methods.items():
            metric, own = scores(seeds)
            found = compare(own, base) if base and name != first else None
            diversity = _mean_diversity(seeds)
            lines.append(
                (
                    name,
                    str(len(seeds)),
                    f"{statistics.fmean(own.values()):.2f} +- {deviation(list(own.values())):.2f}",
                    "-" if found is None else f"{found.difference:+.2f} ({found.low:+.2f} to {found.high:+.2f})",
                    "-" if found is None else f"{found.p_value:.3f}",
                    "-" if found is None else f"{found.detectable:.2f}",
                    *(figure(diversity[key]) if key in diversity else "-" for key in list(UNITS)[:3]),
                    figure(diversity["change_size"]) if "change_size" in diversity else "-",
                    "-" if (left := _leftover(seeds)) is None else figure(left),
                )
            )
        headers = (
            *("Method", "Seeds", metric, f"Against {first}", "p", "Detectable"),
            *("Output cosine", "Response cosine", "Change cosine", "Size of change", "Leftover"),
        )
        sections.append(Section(title=task, note=note, table=Table(headers=headers, rows=tuple(lines))))
    return sections


def _pictures(runs: Runs, first: str) -> list[Section]:
    """Experts x experts before and after, and losses, of the first seed."""
    sections = []
    for task, methods in runs.items():
        maps = []
        for name in (first, OMOE):
            seeds = methods.get(name, {})
            if not seeds:
                continue
            finished = seeds[min(seeds)].finished
            for when, layers in (("before", finished.before), ("after", finished.after)):
                for metric in ("output_cosine", "change_cosine"):
                    shown = {f"layer {layer.name}": _numbers(layer.matrices[metric]) for layer in layers}
                    if shown and not any(math.isnan(v) for m in shown.values() for row in m for v in row):
                        low = min(0.0, *(v for m in shown.values() for row in m for v in row))
                        title = f"{name}: {metric.replace('_', ' ')} {when}"
                        maps.append(plots.heat_maps(shown, title=title, low=low, high=1.0))
        losses = {
            name: (list(range(len(smooth))), smooth)
            for name, seeds in methods.items()
            if (smooth := _smoothed(seeds[min(seeds)].finished.losses))
        }
        maps.append(plots.curves(losses, title="Loss, averaged over ten steps", x_label="ten steps", y_label="nats"))
        sections.append(Section(title=f"{task}: experts and losses of one seed", plots=tuple(maps)))
    return sections


def _numbers(matrix: Sequence[Sequence[float | None]]) -> list[list[float]]:
    return [[math.nan if value is None else value for value in row] for row in matrix]


def _smoothed(losses: Sequence[float], width: int = 10) -> list[float]:
    return [statistics.fmean(losses[start : start + width]) for start in range(0, len(losses), width)]


def _plain(name: str) -> str:
    return name.partition(":")[0]
