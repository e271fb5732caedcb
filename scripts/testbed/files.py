"""Writes that are whole or absent, and hashes of what was written."""

import hashlib
import os
import secrets
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a file atomically and durably: a reader, or a crash, sees the old content or the new, never half of it.

    Raises:
        OSError: Where the disk is full or the folder cannot be written; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def cache_folder() -> Path:
    """Where what was searched or measured here is kept between runs, by the platform's convention."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quartet"


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
