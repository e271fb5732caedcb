"""What a finished run leaves: one JSON file, named by what was run, so that no run is repeated and none is lost."""

import dataclasses
import hashlib
import json
import logging
import re
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


def path_of(folder: Path, settings: Mapping[str, Any], *, task: str, method: str, seed: int) -> Path:
    """The file of a run: another one for any setting that changes its figures.

    Args:
        folder: Of the study.
        settings: Plain values.
        task: Name of the data set.
        method: As the configuration names it.
        seed: Of the run.
    """
    text = json.dumps([FORMAT, settings, task, method, seed], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    return folder / task / f"{re.sub(r'[^a-z0-9_.=-]+', '-', method)}-seed{seed}-{digest}.json"


def write(path: Path, record: Record) -> None:
    """Keep a run, atomically."""
    write_text(path, json.dumps({"format": FORMAT, **dataclasses.asdict(record)}, indent=1) + "\n")


def read(path: Path) -> Record | None:
    """A kept run; None where there is none, or where the file is damaged, which is reported."""
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise ValueError(f"format is not {FORMAT}")
        finished = content.pop("finished")
        for when in ("before", "after"):
            finished[when] = [_layer(layer) for layer in finished[when]]
        return Record(**content, finished=Finished(**finished))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s is run again: it cannot be read (%s)", path, error)
        return None


def _layer(content: Mapping[str, Any]) -> LayerDiversity:
    layer = LayerDiversity(**content)
    if set(layer.figures) != set(FIGURES) or not isinstance(layer.load_E, Sequence):
        raise ValueError(f"figures are {sorted(layer.figures)}")
    return layer
