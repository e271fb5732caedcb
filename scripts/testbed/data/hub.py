"""The hub's own format: rows with the hub's columns, from the hub by name or from a folder of its files."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet

from scripts.testbed.data.files import Located, csv_rows_of, json_rows_of
from scripts.testbed.data.tasks import Row

SUFFIXES = (".parquet", ".jsonl", ".csv")
PARQUET_COPY = "refs/convert/parquet"  # the hub's conversion of a set whose main branch is a script, which nobody runs
REACH_TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class HubSource:
    """Where the hub keeps a data set."""

    path: str
    """Owner and name."""
    config: str | None = None
    """The set's configuration; None takes its only one."""
    revision: str | None = None
    """Branch or commit; None takes the main branch."""
    folder: str | None = None
    """Folder within the revision; None takes all of it."""
    splits: Mapping[str, str]
    """Our split (train, valid, test, or all) -> the hub's split."""

    def __str__(self) -> str:
        return f"hub:{self.path}" + "".join(f"/{part}" for part in (self.config or self.folder,) if part)


@dataclass(frozen=True)
class Pick:
    """Makes a canonical row of a hub row by naming, for each canonical column, the hub's column."""

    columns: tuple[tuple[str, str], ...]
    """(canonical column, the hub's column); a dot enters a record."""

    def __call__(self, row: Row) -> Row:
        """The canonical row.

        Raises:
            ValueError: The row lacks a column.
        """
        picked: Row = {}
        for canonical, path in self.columns:
            value: object = row
            for part in path.split("."):
                if not isinstance(value, Mapping) or part not in value:
                    raise ValueError(f"{path}: no such column; the columns are {', '.join(map(str, row))}")
                value = value[part]
            picked[canonical] = value
        return picked


def fetch(source: HubSource) -> dict[str, datasets.Dataset]:
    """Downloads a data set, or takes it from the hub's cache where HF_HUB_OFFLINE is set.

    Args:
        source: Where it is.

    Returns:
        Our split -> a table with the hub's columns.

    Raises:
        ValueError: The hub lacks one of the splits.
        Exception: Whatever the hub's client raises, at once where there is no network.
    """
    if not huggingface_hub.is_offline_mode():  # asked once: the download itself retries for half a minute
        huggingface_hub.HfApi().dataset_info(source.path, revision=source.revision, timeout=REACH_TIMEOUT_SECONDS)
    tables = datasets.load_dataset(source.path, source.config, data_dir=source.folder, revision=source.revision)
    missing = sorted(set(source.splits.values()) - set(tables))
    if missing:
        raise ValueError(f"{source}: no split {', '.join(missing)}; the hub has {', '.join(tables)}")
    return {split: tables[hub_split] for split, hub_split in source.splits.items()}


def files_by_split(root: Path) -> dict[str, list[Path]]:
    """The hub's split -> its files, in `root` or one folder below, by the start of the file's or the folder's name."""
    found: dict[str, list[Path]] = {}
    for path in sorted([*root.glob("*.*"), *root.glob("*/*.*")]):
        if path.suffix in SUFFIXES and path.is_file():
            number = path.stem.partition("-")[0]
            found.setdefault(path.parent.name if number.isdecimal() else number, []).append(path)
    return found


def folder_rows(root: Path, source: HubSource) -> dict[str, Iterable[Located]]:
    """The rows of a folder that holds the hub's files, with the hub's columns.

    Args:
        root: The folder, such as `root/train-00000-of-00001.parquet` or `root/CONFIG/validation.jsonl`.
        source: Which splits are wanted.

    Returns:
        Our split -> (place, row).

    Raises:
        FileNotFoundError: A split has no file.
    """
    files = files_by_split(root)
    for hub_split in source.splits.values():
        if hub_split not in files:
            names = " or ".join(f"{hub_split}*{suffix}" for suffix in SUFFIXES)
            raise FileNotFoundError(f"{root / names}: no such file")
    return {split: rows_of(files[hub_split]) for split, hub_split in source.splits.items()}


def rows_of(paths: list[Path]) -> Iterator[Located]:
    """The rows of some files one after another."""
    for path in paths:
        if path.suffix == ".jsonl":
            yield from json_rows_of(path)
        elif path.suffix == ".csv":
            yield from csv_rows_of(path)
        else:
            try:
                rows = pyarrow.parquet.read_table(path).to_pylist()
            except pyarrow.ArrowException as error:
                raise ValueError(f"{path}: not a parquet file ({error})") from error
            yield from ((f"{path}:row {number}", row) for number, row in enumerate(rows))
