"""Winners kept in files between runs: one file for each chain, device and version of what plans and emits.

Every key has its own file, which is replaced whole, so writers in other processes lose nothing and a reader sees a
whole file or none. Nothing in a file is trusted; one that cannot be used is reported once and written anew.

    <folder>/<chains of one structure>/<one chain>.json    {"key": {...}, "winner": {...}}
"""

import hashlib
import json
import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from fusion.plan.prune import tile_sizes
from fusion.run.files import cache_root, write_whole
from fusion.run.winner import Key, Winner, WinnerError, code_version, decode, encode, encode_key

logger = logging.getLogger(__name__)

MAX_FILE_BYTES = 1 << 20  # of one winner; a file beyond it is none of ours
MAX_EXPORT_BYTES = 1 << 30


class CacheError(ValueError):
    """A file that cannot be imported; the message says what is wrong with it; not in the paper."""


def default_folder() -> Path:
    """`winners` in the cache folder, $XDG_CACHE_HOME/quartet/fusion; not in the paper."""
    return cache_root() / "winners"


class Cache:
    """The files of one folder.

    Source: not in the paper.
    """

    def __init__(self, cache_folder: str | Path | None = None) -> None:
        """Of a folder that need not exist.

        Args:
            cache_folder: Where the files are; None is `default_folder()`.
        """
        self.folder = default_folder() if cache_folder is None else Path(cache_folder)
        self._reported: set[Path] = set()

    def load(self, key: Key) -> Winner | None:
        """The winner of a key, if there is a usable file.

        Args:
            key: Chain, device and version.
        """
        found = self._read(self._path(key))
        return None if found is None else found[1]

    def store(self, key: Key, winner: Winner) -> None:
        """Write a winner in place of what is there; where nothing can be written, that is reported.

        Args:
            key: Chain, device and version.
            winner: Of that chain.

        Raises:
            WinnerError: It is no winner of that chain.
        """
        path, content = self._path(key), encode(key, winner)
        decode(content)
        try:
            write_whole(path, json.dumps(content, indent=1))
        except OSError as error:
            logger.warning("%s cannot be written, so the next process searches again: %s", path, error)

    def nearest(self, key: Key) -> Winner | None:
        """The winner of the chain of the same structure, dtype, device and version whose sizes are the nearest.

        Args:
            key: Of another chain, or of one that has been stored.

        Returns:
            The winner with its tiles cut to the sizes of the key's chain, to begin a search with; distance is that of
            the logarithms of all sizes. None if there is none.
        """
        sizes, nearest = key.chain.sizes, None
        for path in sorted(self._path(key).parent.glob("*.json")):
            found = self._read(path)
            if found is None:
                continue
            other = found[0].chain.sizes
            distance = sum(math.log(max(sizes[x], 1) / max(other[x], 1)) ** 2 for x in sizes)
            if nearest is None or distance < nearest[0]:
                nearest = distance, found[1]
        if nearest is None:
            return None
        plan = nearest[1].schedule
        tiles = tuple((letter, min(tile, tile_sizes(sizes[letter])[-1])) for letter, tile in plan.tiles)
        return replace(nearest[1], schedule=replace(plan, tiles=tiles))

    def export(self, path: str | Path) -> int:
        """Write all usable winners of this version into one file.

        Args:
            path: The file; it is replaced.

        Returns:
            How many.

        Raises:
            OSError: It cannot be written.
        """
        entries = [encode(*entry) for entry in self._entries() if entry[0].code == code_version()]
        write_whole(Path(path), json.dumps({"code": code_version(), "entries": entries}, indent=1))
        return len(entries)

    def import_(self, path: str | Path) -> int:
        """Take winners from a file that `export` wrote, where there is none yet or a slower one.

        Args:
            path: The file.

        Returns:
            How many were taken.

        Raises:
            CacheError: The file is of another version, or anything in it is wrong; then nothing is taken.
            OSError: It cannot be read.
        """
        try:
            content = _parsed(Path(path), MAX_EXPORT_BYTES)
        except WinnerError as error:
            raise CacheError(f"{path}: {error}") from error
        if not isinstance(content, dict) or content.keys() != {"code", "entries"}:
            raise CacheError(f"{path}: accepted is what Cache.export writes, an object of code and entries")
        if content["code"] != code_version():
            raise CacheError(
                f"{path}: is of version {content['code']!r} of fusion, this is {code_version()!r}; its winners may "
                "mean something else here: search again, or export them with this version"
            )
        if not isinstance(content["entries"], list):
            raise CacheError(f"{path}: entries must be a list")
        entries = []
        for index, entry in enumerate(content["entries"]):
            try:
                key, winner = decode(entry)
            except WinnerError as error:
                raise CacheError(f"{path}: entry {index}: {error}") from error
            if key.code != code_version():
                raise CacheError(f"{path}: entry {index}: is of version {key.code!r}")
            entries.append((key, winner))
        taken = [(key, winner) for key, winner in entries if winner.is_better(self.load(key))]
        for key, winner in taken:
            self.store(key, winner)
        return len(taken)

    def _entries(self) -> Iterator[tuple[Key, Winner]]:
        for path in sorted(self.folder.glob("*/*.json")):
            found = self._read(path)
            if found is not None:
                yield found

    def _path(self, key: Key) -> Path:
        return self.folder / _hash(key.structure) / f"{_hash(key)}.json"

    def _read(self, path: Path) -> tuple[Key, Winner] | None:
        try:
            key, winner = decode(_parsed(path, MAX_FILE_BYTES))
            if self._path(key) != path:
                raise WinnerError(f"it belongs into {self._path(key)}")
            return key, winner
        except FileNotFoundError:
            return None
        except (OSError, WinnerError) as error:
            if path not in self._reported:
                self._reported.add(path)
                logger.warning("%s is not used and will be written anew: %s", path, error)
            return None


def _parsed(path: Path, max_bytes: int) -> Any:
    size = path.stat().st_size
    if size > max_bytes:
        raise WinnerError(f"has {size} bytes, accepted are {max_bytes}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of the decoder, of json, and of integers with too many digits
        raise WinnerError(f"is not JSON: {error}") from error


def _hash(key: Key) -> str:
    return hashlib.sha256(json.dumps(encode_key(key), sort_keys=True).encode()).hexdigest()[:32]
