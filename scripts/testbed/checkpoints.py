"""Checkpoints that can be trusted: sealed with a manifest when whole, and checked against it before they are used.

A checkpoint without a manifest was interrupted; one whose files differ from it was damaged. Either is reported and
the newest sealed one before it is taken.
"""

import json
import logging
import re
from pathlib import Path

from scripts.testbed.files import sha256, write_text

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = 1
NAME = re.compile(r"checkpoint-(\d+)")


def seal(folder: Path) -> None:
    """Declare a checkpoint whole: write the size and hash of its every file, atomically and last."""
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    write_text(folder / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=1))


def damage(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, or None where it is whole."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return "it has no manifest, so saving it was interrupted"
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            return f"its manifest has format {content['format']!r}, expected {FORMAT}"
        listed = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in content["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest cannot be read ({error})"
    present = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {MANIFEST}
    if foreign := sorted(present - listed.keys()):
        return f"it holds files that are not in its manifest: {', '.join(foreign)}"
    for name, (size_bytes, digest) in listed.items():
        path = folder / name
        if not path.is_file() or path.is_symlink():
            return f"{name} is missing"
        if path.stat().st_size != size_bytes:
            return f"{name} has {path.stat().st_size} bytes, expected {size_bytes}"
        if sha256(path) != digest:
            return f"the content of {name} was changed"
    return None


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint below a folder, reporting every newer one that had to be passed over.

    Args:
        folder: Holds `checkpoint-<step>` folders; whatever else lies there is reported and left alone.
    """
    if not folder.is_dir():
        return None
    steps: dict[int, Path] = {}
    for path in folder.iterdir():
        match = NAME.fullmatch(path.name)
        if match and path.is_dir() and not path.is_symlink():
            steps[int(match.group(1))] = path
        else:
            logger.warning("%s is not a checkpoint and is ignored", path)
    for step in sorted(steps, reverse=True):
        reason = damage(steps[step])
        if reason is None:
            return steps[step]
        logger.warning("%s is not used: %s", steps[step], reason)
    return None
