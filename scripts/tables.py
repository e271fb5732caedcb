"""Make the README's tables from committed rows: python -m scripts.tables [--check]."""

import argparse
import difflib
import re
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import yaml

from scripts.testbed.files import write_text
from scripts.testbed.report import figure
from scripts.testbed.rows import REPOSITORY, RESULTS, RecordedRow, read_rows

MARKER = re.compile(r"(<!-- table: (?P<name>[\w/]+)(?: only: (?P<only>[^>]+?))? -->\n).*?(<!-- end -->)", re.DOTALL)
METHODS_MARKER = re.compile(
    r"(<!-- (?P<kind>runs|methods): (?P<name>[\w/]+) columns: (?P<columns>[^>]+?) -->\n).*?(<!-- end -->)", re.DOTALL
)
HEADERS = ("Provider", "Figure", "Paper", "Ours", "Unit", "Kind", "Hardware", "Commit")


def main() -> None:
    """Rewrite the tables between markers, or with --check fail where they are stale."""
    parser = argparse.ArgumentParser(prog="python -m scripts.tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if README.md is not up to date")
    parser.add_argument("--readme", type=Path, default=REPOSITORY / "README.md", help="the file that holds the markers")
    arguments = parser.parse_args()
    before = arguments.readme.read_text(encoding="utf-8")
    try:
        after = regenerate(before, rows=[row for path in sorted(RESULTS.glob("*.csv")) for row in read_rows(path)])
    except ValueError as error:
        sys.exit(f"error: {error}")
    if before == after:
        return
    if arguments.check:
        lines = difflib.unified_diff(before.splitlines(), after.splitlines(), "README.md", "from rows", lineterm="")
        sys.exit("README.md is stale; run python -m scripts.tables\n" + "\n".join(lines))
    write_text(arguments.readme, after)


def regenerate(text: str, *, rows: Sequence[RecordedRow]) -> str:
    """Replace what stands between every pair of markers by the table of that experiment's rows.

    Args:
        text: The page, with `<!-- table: <experiment> -->` and `<!-- end -->` around each table. Of an experiment with
            many rows, `<!-- table: <experiment> only: <pattern> <pattern> -->` shows those whose `provider/metric`
            matches a pattern, as in a shell. `<!-- runs: <experiment> columns: <metric> <metric> -->` is a line per
            method with the mean over its seeds, `methods:` instead of `runs:` one where rows hold such means.
        rows: All committed rows.

    Raises:
        ValueError: For a marker whose experiment has no rows, or whose pattern matches none.
    """

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        own = [row for row in rows if row.experiment == name]
        if not own:
            raise ValueError(f"README.md: no rows of {name} in scripts/results; make them with record=true")
        patterns = (match["only"] or "*").split()
        for pattern in patterns:
            if not any(fnmatchcase(f"{row.provider}/{row.metric}", pattern) for row in own):
                raise ValueError(f"README.md: no row of {name} matches {pattern!r}")
        shown = [row for row in own if any(fnmatchcase(f"{row.provider}/{row.metric}", p) for p in patterns)]
        return f"{match[1]}{table(shown)}{match[4]}"

    def replace_methods(match: re.Match[str]) -> str:
        own = [row for row in rows if row.experiment == match["name"]]
        if not own:
            raise ValueError(f"README.md: no rows of {match['name']} in scripts/results; make them with record=true")
        write = runs_table if match["kind"] == "runs" else methods_table
        return f"{match[1]}{write(own, match['columns'].split())}{match[5]}"

    return METHODS_MARKER.sub(replace_methods, MARKER.sub(replace, text))


def runs_table(rows: Sequence[RecordedRow], columns: Sequence[str]) -> str:
    """A Markdown table of a comparison: one line per method, the mean over its seeds and their deviation, all p-values.

    Args:
        rows: The rows of one experiment, each of a method (its provider) and a seed.
        columns: Metrics to show.

    Raises:
        ValueError: For a column that no row has.
    """
    lines = []
    for method, own in _by_method(rows, columns).items():
        cells = [_over_seeds([row for row in own if row.metric == column]) for column in columns]
        lines.append((method, str(len({row.seed for row in own})), *cells))
    return _with_sources(("Method", "Seeds", *columns), lines, [row for row in rows if row.metric in columns])


def methods_table(rows: Sequence[RecordedRow], columns: Sequence[str]) -> str:
    """A Markdown table of a comparison whose rows are means already: one line per method that has a column's metric.

    Args:
        rows: The rows of one experiment, at most one of a method (its provider) and a metric.
        columns: Metrics to show.

    Raises:
        ValueError: For a column that no row has.
    """
    lines = []
    for method, own in _by_method(rows, columns).items():
        found = {row.metric: row for row in own}
        cells = [_value(found[column]) if column in found else "-" for column in columns]
        if any(column in found for column in columns):
            lines.append((method, *cells))
    shown = [row for row in rows if row.metric in columns]
    return _with_sources(("Method", *columns), lines, shown)


def _by_method(rows: Sequence[RecordedRow], columns: Sequence[str]) -> dict[str, list[RecordedRow]]:
    for column in columns:
        if not any(row.metric == column for row in rows):
            raise ValueError(f"README.md: no row of {rows[0].experiment} has the metric {column!r}")
    return {
        method: [row for row in rows if row.provider == method] for method in dict.fromkeys(r.provider for r in rows)
    }


def _with_sources(headers: Sequence[str], lines: Sequence[Sequence[str]], rows: Sequence[RecordedRow]) -> str:
    text = ["| " + " | ".join(cells) + " |" for cells in (headers, *lines)]
    text.insert(1, "|" + " --- |" * len(headers))
    devices = [device for device, _ in Counter(row.device for row in rows).most_common()]
    where = []
    for device in devices:
        own = [row for row in rows if row.device == device]
        commits = ", ".join(sorted({row.commit for row in own}))
        methods = ", ".join(dict.fromkeys(row.provider for row in own))
        where.append(f"{device} at {commits}" + (f": {methods}" if device != devices[0] else ""))
    return "\n".join(text) + f"\n\nMeasured on {'; '.join(where)}.\n"


def _value(row: RecordedRow) -> str:
    if row.low is None:
        return figure(row.value)
    dash = " to " if row.low < 0 else "-"
    return f"{figure(row.value)} ({figure(row.low)}{dash}{figure(row.high)})"


def _over_seeds(rows: Sequence[RecordedRow]) -> str:
    if rows and rows[0].metric.startswith("p_value"):  # which have no meaningful mean
        return ", ".join(figure(row.value) for row in sorted(rows, key=lambda row: row.seed))
    return mean_and_deviation([row.value for row in rows])


def mean_and_deviation(values: Sequence[float]) -> str:
    """A mean with the seeds' standard deviation; `-` for no value, and no deviation for one."""
    if len(values) < 2:
        return figure(values[0]) if values else "-"
    return f"{figure(statistics.mean(values))} +- {statistics.stdev(values):.2g}"


def table(rows: Sequence[RecordedRow]) -> str:
    """A Markdown table: one line per row, the paper's figure beside ours where the paper has one."""
    paper = paper_figures(rows[0].experiment)
    lines = ["| " + " | ".join(HEADERS) + " |", "|" + " --- |" * len(HEADERS)]
    for row in rows:
        known = paper.get(f"{row.provider}/{row.metric}")
        value = _value(row)
        cells = (
            row.provider,
            row.metric,
            "-" if known is None else figure(known),
            value,
            row.unit,
            row.kind,
            row.device,
        )
        lines.append("| " + " | ".join((*cells, row.commit)) + " |")
    return "\n".join(lines) + "\n"


def paper_figures(experiment: str) -> dict[str, float]:
    """The paper's own numbers of an experiment, `provider/metric` -> value; none where its file gives none."""
    path = REPOSITORY / "configs" / "experiment" / f"{experiment}.yaml"
    content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    return dict(content.get("paper", {}))


if __name__ == "__main__":
    main()
