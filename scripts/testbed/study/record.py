"""What a finished run leaves, named by what was run, so that no run is repeated and none is lost."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.testbed.files import write_text
from scripts.testbed.study.diversity import FIGURES, LayerDiversity
from scripts.testbed.study.training import Finished

logger = logging.getLogger(__name__)

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Record:
    """A finished run and where it comes from."""

    task: str
    method: str
    seed: int
    commit: str
    device: str
    finished: Finished


def digest(settings: Mapping[str, Any], *, task: str, method: str, seed: int) -> str:
    """What names a run: another text for any setting that changes its figures.

    Args:
        settings: Plain values.
        task: Name of the data set.
        method: As the configuration names it.
        seed: Of the run.
    """
    text = json.dumps([FORMAT, settings, task, method, seed], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Records:
    """The finished runs of a study: a file each, and those that are committed, all in one file.

    Args:
        folder: Where runs are kept as they finish; several processes may write there.
        committed: One run a line; read where the folder lacks a run, and written by `commit` alone.
    """

    def __init__(self, folder: Path, committed: Path) -> None:
        self._folder, self._committed = folder, committed
        self._lines = _lines(committed)

    def get(self, name: str) -> Record | None:
        """A finished run; None where there is none, or where its file is damaged, which is reported."""
        path = self._folder / f"{name}.json"
        try:
            if path.exists():
                return _parse(path.read_text(encoding="utf-8"))
            return _parse(self._lines[name]) if name in self._lines else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("%s is run again: it cannot be read (%s)", path, error)
            return None

    def put(self, name: str, record: Record) -> Record:
        """Keep a run, atomically; returns it as it was kept."""
        text = _text(record)
        write_text(self._folder / f"{name}.json", text + "\n")
        return _parse(text)

    def commit(self, found: Mapping[str, Record]) -> None:
        """Put runs into the committed file, in place of its earlier ones of the same names."""
        lines = {**self._lines, **{name: _text(record) for name, record in found.items()}}
        lines = dict(sorted(lines.items(), key=lambda item: _place(item[1])))
        write_text(self._committed, "".join(f"{name} {text}\n" for name, text in lines.items()))


def _lines(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    pairs = [line.partition(" ") for line in path.read_text(encoding="utf-8").splitlines()]
    return {name: text for name, _, text in pairs}


def _place(text: str) -> tuple[str, str, int]:
    content = json.loads(text)
    return content["task"], content["method"], content["seed"]


def _text(record: Record) -> str:
    return json.dumps(_short({"format": FORMAT, **dataclasses.asdict(record)}), separators=(",", ":"))


def _short(value: Any) -> Any:
    """Figures with seven digits: more say nothing."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, dict):
        return {key: _short(part) for key, part in value.items()}
    return [_short(part) for part in value] if isinstance(value, list | tuple) else value


def _parse(text: str) -> Record:
    content = json.loads(text)
    if content.pop("format") != FORMAT:
        raise ValueError(f"format is not {FORMAT}")
    finished = content.pop("finished")
    for when in ("before", "after"):
        finished[when] = [_layer(layer) for layer in finished[when]]
    return Record(**content, finished=Finished(**finished))


def _layer(content: Mapping[str, Any]) -> LayerDiversity:
    layer = LayerDiversity(**content)
    if set(layer.figures) != set(FIGURES) or not isinstance(layer.load_E, Sequence):
        raise ValueError(f"figures are {sorted(layer.figures)}")
    return layer
