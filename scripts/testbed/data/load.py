"""load(config): the one way to a data set."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets

from configs.sections import DataConfig
from scripts.testbed.data.data_set import DataSet
from scripts.testbed.data.files import Located
from scripts.testbed.data.hub import fetch, files_by_split, folder_rows
from scripts.testbed.data.registry import DataError, find
from scripts.testbed.data.splits import content_sha256, evenly_spaced, three_splits
from scripts.testbed.data.tasks import Row, Task, canonical_row, features_of

CORPORA = Path(__file__).parent.parent / "corpora"


@dataclass(frozen=True, kw_only=True)
class Data:
    """A data set that is ready for use; every table has the canonical columns and `sentence_id`, its row number."""

    name: str
    """Its key in the registry."""
    task: Task
    """What is learnt."""
    train: datasets.Dataset
    """Training rows; none where the set is for evaluation only."""
    valid: datasets.Dataset
    """Rows for choosing."""
    test: datasets.Dataset
    """Rows for reporting."""
    label_names: tuple[str, ...]
    """Classes or tags in the order of their numbers; empty for other tasks."""
    sha256: str
    """Hash of every row used, the same for a hub copy and a local copy that agree."""
    licence: str
    """What may be done with the set."""
    source: str
    """Where it came from, without a path of this machine, and how its splits were made."""


def load(config: DataConfig) -> Data:
    """Loads a data set from `config.root`, else from the shipped corpora, else from the hub.

    Args:
        config: Which set, from where, and how much of it.

    Returns:
        The set in canonical form.

    Raises:
        DataError: The name is unknown, or the set is missing or malformed. Nothing else is ever loaded in its place.
    """
    data_set = find(config.name)
    try:
        tables, source = tables_of(data_set, config.root)
        splits = three_splits(tables)
    except (OSError, ValueError) as error:
        raise DataError(f"data {data_set.name}: {error}. {expectation(data_set)}") from error
    limits = {"train": config.max_train, "valid": config.max_eval, "test": config.max_eval}
    splits = {split: evenly_spaced(table, limits[split]) for split, table in splits.items()}
    numbered = {split: with_ids(table) for split, table in splits.items()}
    return Data(
        name=data_set.name,
        task=data_set.task,
        **numbered,
        label_names=data_set.label_names,
        sha256=content_sha256(splits),
        licence=data_set.licence,
        source=f"{source}; {data_set.splits}",
    )


def with_ids(table: datasets.Dataset) -> datasets.Dataset:
    """The table with its rows' numbers."""
    return table.add_column("sentence_id", list(range(len(table))), feature=datasets.Value("int64"))


def tables_of(data_set: DataSet, root: str | None) -> tuple[dict[str, datasets.Dataset], str]:
    """The source's splits as canonical tables, and what the source was."""
    if root is not None:
        return from_folder(data_set, Path(root)), "data.root"
    if data_set.origin:
        raise ValueError(
            "data.root: got null, accepts the folder that holds the set, which neither ships nor is on the hub"
        )
    if data_set.hub is None:
        return from_folder(data_set, CORPORA / data_set.name), "shipped corpus"
    try:
        fetched = fetch(data_set.hub)
    except Exception as error:  # the client lets through whatever its transport raises
        raise ValueError(f"{data_set.hub} cannot be fetched ({type(error).__name__}: {error})") from error
    adapt = partial(adapted, data_set=data_set, in_hub_format=True)
    features = features_of(data_set.task, pair=data_set.pair, label_names=data_set.label_names)
    tables = {
        split: table.map(adapt, remove_columns=table.column_names, features=features)
        for split, table in fetched.items()
    }
    return tables, str(data_set.hub)


def from_folder(data_set: DataSet, root: Path) -> dict[str, datasets.Dataset]:
    """The canonical tables of a folder in the set's own layout or else in the hub's format."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    own_layout = any((root / file).exists() for file in data_set.files)
    in_hub_format = data_set.read is None or (
        not own_layout and data_set.hub is not None and bool(files_by_split(root))
    )
    if in_hub_format:
        assert data_set.hub is not None, data_set.name
        splits = folder_rows(root, data_set.hub)
    else:
        assert data_set.read is not None, data_set.name
        splits = data_set.read(root)
    return {split: table_of(data_set, rows, in_hub_format=in_hub_format) for split, rows in splits.items()}


def table_of(data_set: DataSet, rows: Iterable[Located], *, in_hub_format: bool) -> datasets.Dataset:
    """A table of checked rows; a row that fails is named by its place."""
    features = features_of(data_set.task, pair=data_set.pair, label_names=data_set.label_names)
    columns: dict[str, list[object]] = {column: [] for column in features}
    for place, row in rows:
        try:
            checked = adapted(row, data_set=data_set, in_hub_format=in_hub_format)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        for column, values in columns.items():
            values.append(checked[column])
    return datasets.Dataset.from_dict(columns, features=features)


def adapted(row: Row, *, data_set: DataSet, in_hub_format: bool) -> Row:
    """The checked canonical row of a row with the canonical columns or the hub's."""
    picked = data_set.from_hub(row) if in_hub_format and data_set.from_hub is not None else row
    return canonical_row(picked, data_set.task, pair=data_set.pair, label_names=data_set.label_names)


def expectation(data_set: DataSet) -> str:
    """What a folder for this set must hold, and how to name it."""
    layouts = [f"{', '.join(data_set.files)} ({data_set.line})"] if data_set.files else []
    if data_set.hub is not None:
        names = ", ".join(f"{split}*" for split in data_set.hub.splits.values())
        layouts.append(f"{names} as parquet, jsonl or csv with the columns of {data_set.hub}")
    shipped = "restore the shipped corpus from the repository" if data_set.hub is None else "load where the hub answers"
    fix = f"from {data_set.origin}" if data_set.origin else f"or {shipped}"
    return f"Expected layout: {'; or '.join(layouts)}. Fix: data.root=PATH of such a folder, {fix}"
