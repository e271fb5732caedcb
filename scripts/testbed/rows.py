"""Result rows: what a run measured, on what, and at which commit; written as CSV and as one JSON line."""

import csv
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

import torch

from scripts.testbed.files import write_text

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "scripts" / "results"
Kind = Literal["measured", "simulated", "paper"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure of one provider."""

    provider: str
    """What was measured: a method, a baseline, a peer."""
    metric: str
    """Stable name of the figure."""
    unit: str
    """Unit of `value`."""
    value: float
    """The figure: a median where it was timed, a mean where it has a deviation."""
    low: float | None = None
    """20th percentile of a timing."""
    high: float | None = None
    """80th percentile of a timing."""
    kind: Kind | None = None
    """Where the figure comes from, if not from where the run's other figures do."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a verb returns: rows, headline figures and where they come from."""

    experiment: str
    kind: Kind
    rows: tuple[Row, ...]
    summary: Mapping[str, float | int | str | None]
    seed: int
    data_sha256: str
    commit: str
    device: str
    versions: Mapping[str, str]
    date: str

    def json_line(self) -> str:
        """The one line a verb prints last; figures that are not finite become null."""
        labelled = tuple(dataclasses.replace(row, kind=row.kind or self.kind) for row in self.rows)
        return json.dumps(_finite(dataclasses.asdict(dataclasses.replace(self, rows=labelled))), allow_nan=False)


@dataclass(frozen=True, kw_only=True)
class RecordedRow:
    """A row as it stands in a CSV file, with its provenance."""

    experiment: str
    provider: str
    metric: str
    unit: str
    value: float
    low: float | None
    high: float | None
    kind: str
    seed: int
    data_sha256: str
    commit: str
    device: str
    versions: str
    date: str


FIELDS = tuple(field.name for field in dataclasses.fields(RecordedRow))


def headlines(provider: str, summary: Mapping[str, float | int | str | None]) -> list[Row]:
    """A summary's fractions and counts as rows, so that tables can show them.

    Args:
        provider: Whose figures they are.
        summary: Name -> figure; `paper_...` are the paper's. Text and what is missing is left out.
    """
    rows = []
    for name, value in summary.items():
        if isinstance(value, float | int):
            unit = "%" if name.endswith("_percent") else "s" if name.startswith("seconds_") else ""
            unit = unit or ("ratio" if isinstance(value, float) else "count")
            kind: Kind | None = "paper" if name.startswith("paper_") else None
            rows.append(Row(provider=provider, metric=name, unit=unit, value=float(value), kind=kind))
    return rows


def recorded(result: Result) -> list[RecordedRow]:
    """The rows of a result with its provenance on each."""
    provenance: dict[str, Any] = {
        "experiment": result.experiment,
        "seed": result.seed,
        "data_sha256": result.data_sha256[:16],
        "commit": result.commit,
        "device": result.device,
        "versions": " ".join(f"{name}={version}" for name, version in result.versions.items()),
        "date": result.date,
    }
    return [
        RecordedRow(**{**dataclasses.asdict(row), **provenance, "kind": row.kind or result.kind}) for row in result.rows
    ]


def write_rows(path: Path, rows: Iterable[RecordedRow]) -> None:
    """Write rows as CSV, atomically."""
    lines = [",".join(FIELDS)]
    for row in rows:
        cells = ["" if value is None else _cell(value) for value in dataclasses.astuple(row)]
        lines.append(",".join(cells))
    write_text(path, "\n".join(lines) + "\n")


def read_rows(path: Path) -> list[RecordedRow]:
    """Read rows, checking every line.

    Raises:
        ValueError: Names the file, the line and what is wrong with it.
    """
    hints = get_type_hints(RecordedRow)
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != FIELDS:
            raise ValueError(f"{path}: columns are {reader.fieldnames}, expected {list(FIELDS)}")
        rows = []
        for number, cells in enumerate(reader, start=2):
            if None in cells or None in cells.values():
                raise ValueError(f"{path}, line {number}: expected {len(FIELDS)} cells")
            try:
                values = {name: _parse(hints[name], text) for name, text in cells.items()}
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            rows.append(RecordedRow(**values))  # type: ignore[arg-type]
    return rows


def record(result: Result, *, one_run: bool = False) -> Path:
    """Put a result's rows into scripts/results, in place of the experiment's earlier ones; returns the file.

    Args:
        result: What a verb found.
        one_run: Replace only earlier figures of the same providers and seed: other methods' and seeds' rows stay.
    """
    path = RESULTS / f"{result.experiment.split('/')[0]}.csv"
    earlier = read_rows(path) if path.exists() else []
    new = recorded(result)
    replaced = {_figure_of(row) for row in new}
    kept = [
        row for row in earlier if row.experiment != result.experiment or (one_run and _figure_of(row) not in replaced)
    ]
    write_rows(path, sorted([*kept, *new], key=lambda row: row.experiment))
    return path


def _figure_of(row: RecordedRow) -> tuple[str, str, int]:
    return row.provider, row.metric, row.seed


def commit() -> str:
    """The repository's commit, with `-dirty` where files other than results differ from it; `unknown` outside one."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)scripts/results")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return f"{head}-dirty" if changed else head


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.strip()


def device(kind: str) -> str:
    """A name of the machine a figure was measured on: GPU, or processor, how many cores and which instructions."""
    if kind == "cuda":
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return f"{model.replace(',', ' ')}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def versions(names: Sequence[str] = ("torch", "transformers", "datasets", "deepspeed")) -> dict[str, str]:
    """Installed versions of what figures depend on, Python first."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cell(value: object) -> str:
    text = repr(value) if isinstance(value, float) else str(value)
    if any(mark in text for mark in ',"\n'):
        text = '"' + text.replace('"', '""') + '"'
    return text


def _parse(hint: object, text: str) -> object:
    if hint is str:
        return text
    if hint is int:
        return int(text)
    if text == "" and hint is not float:
        return None
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"got {text!r}, expected a finite number")
    return value


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
