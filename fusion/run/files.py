"""Files between runs: where they lie, and how they are written so that a reader sees all of one or nothing.

Source: not in the paper.
"""

import os
import secrets
from contextlib import suppress
from pathlib import Path


def cache_root() -> Path:
    """$XDG_CACHE_HOME/quartet/fusion, with ~/.cache where that is not set.

    Source: the XDG base directory specification.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quartet" / "fusion"


def write_whole(path: Path, text: str) -> None:
    """Write a file in place of what is there.

    Args:
        path: The file; its folder is made.
        text: All of it.

    Raises:
        OSError: It cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
