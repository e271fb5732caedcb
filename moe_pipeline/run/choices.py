"""Choices: what searches found, kept in files between runs.

One file per layer shape, world, machine and version of this package; a reader or a crash sees a whole file or none, and
what cannot be used is reported and found anew.
"""

import hashlib
import json
import logging
import os
import platform
import secrets
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_pipeline.config import PipelineConfig
from moe_pipeline.plan.chooser import Chooser
from moe_pipeline.plan.ledger import LayerShape
from moe_pipeline.run.ranks import ExpertRanks

logger = logging.getLogger(__name__)

VERSION = 1  # of the file and of what searches mean; another version's files are not used


class Choices:
    """The file of one layer shape.

    Args:
        path: The file; None keeps nothing.
        key: What it is valid for.

    Source: not in the paper.
    """

    def __init__(self, path: Path | None, key: dict[str, Any]) -> None:
        self._path, self._key = path, key
        self._kept: dict[str, Any] = {}

    @classmethod
    def of(cls, pipeline: PipelineConfig, shape: LayerShape, *, dtype: torch.dtype, device: torch.device) -> "Choices":
        """The file for a layer.

        Args:
            pipeline: Its settings; `cache_folder` says where files lie.
            shape: Its sizes, whatever its number of tokens.
            dtype: What it computes in.
            device: Where it computes.

        Source: not in the paper.
        """
        settings = {
            name: value
            for name, value in asdict(pipeline).items()
            if name in ("num_chunks", "restore", "split", "device_budget_bytes", "host_budget_bytes")
        }
        sizes = {name: value for name, value in asdict(shape).items() if name != "tokens"}
        key = {
            "version": VERSION,
            "layer": sizes,
            "dtype": str(dtype),
            "settings": settings,
            "machine": _machine(device),
        }
        if pipeline.cache_folder is None:
            return cls(None, key)
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]
        return cls(Path(pipeline.cache_folder) / f"moe_pipeline_{name}.json", key)

    def restore(self, chooser: Chooser, ranks: ExpertRanks | None, device: torch.device) -> None:
        """Let a chooser begin with what the file holds; the first rank reads it for all.

        Args:
            chooser: Whose searches have not begun.
            ranks: Who decides together.
            device: Where messages must lie.

        Source: not in the paper.
        """
        if self._path is None:
            return
        text = self._read(self._path) if ranks is None or ranks.rank == 0 else ""
        text = text if ranks is None else _from_first(text, ranks, device)
        try:
            self._kept = _searches(text, self._key)
            chooser.restore(self._kept)
        except (ValueError, TypeError) as error:
            logger.warning("%s is not used and will be written anew: %s", self._path, error)
            self._kept = {}

    def keep(self, chooser: Chooser, ranks: ExpertRanks | None) -> None:
        """Write what a chooser has found since, on the first rank.

        Args:
            chooser: Its searches.
            ranks: Who decides together.

        Source: not in the paper.
        """
        if self._path is None or (ranks is not None and ranks.rank):
            return
        state = chooser.state()
        if state and state != self._kept:
            self._kept = state
            _write(self._path, json.dumps({"key": self._key, "searches": state}, indent=1))

    def _read(self, path: Path) -> str:
        try:
            return path.read_text(encoding="utf-8") if path.exists() else ""
        except (OSError, UnicodeDecodeError) as error:
            logger.warning("%s is not used and will be written anew: %s", path, error)
            return ""


def _searches(text: str, key: dict[str, Any]) -> dict[str, Any]:
    if not text:
        return {}
    content = json.loads(text)
    if not isinstance(content, dict) or content.keys() != {"key", "searches"}:
        raise ValueError("it does not hold a key and searches")
    if content["key"] != key:
        version = content["key"].get("version") if isinstance(content["key"], dict) else None
        raise ValueError(f"it was written for version {version!r} or another layer; accepted is version {VERSION}")
    if not isinstance(content["searches"], dict):
        raise ValueError("its searches are not a mapping")
    return content["searches"]


def _from_first(text: str, ranks: ExpertRanks, device: torch.device) -> str:
    """The first rank's text on every rank."""
    first = dist.get_global_rank(ranks.experts, 0)
    content = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    length = torch.tensor([len(content)], device=device)
    dist.broadcast(length, first, group=ranks.experts)
    if ranks.rank:
        content = torch.empty(int(length), dtype=torch.uint8, device=device)
    if int(length):
        dist.broadcast(content, first, group=ranks.experts)
    return bytes(content.tolist()).decode()


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        logger.warning("%s cannot be written, so the next run searches again: %s", path, error)


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
