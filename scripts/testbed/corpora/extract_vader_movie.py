"""Extracts the rated movie-review sentences from the vaderSentiment source distribution.

    python -m scripts.testbed.corpora.extract_vader_movie [--sdist FILE] [--out FOLDER]

Twenty people rated each sentence from -4 to 4; a mean of at least 0.5 either way makes it positive (1) or negative (0)
and anything between is left out. Without arguments `pip download` fetches the file.
"""

import argparse
import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from scripts.testbed.corpora.pack import md5_bucket, write_corpus

PACKAGE = "vaderSentiment"
VERSION = "3.3.2"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = f"{PACKAGE}-{VERSION}/additional_resources/hutto_ICWSM_2014.tar.gz"
RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
LEAST_RATING = 0.5
NUM_ROWS = {"train": 8_097, "valid": 970, "test": 1_003}


def member_bytes(archive: bytes, name: str) -> bytes:
    """One member of a .tar.gz held in memory; nothing is unpacked to disk."""
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as opened:
        content = opened.extractfile(name)
        if content is None:
            raise ValueError(f"{name}: not a file in the archive; give the source distribution of version {VERSION}")
        return content.read()


def extract(sdist: bytes) -> dict[str, list[tuple[str, str, str]]]:
    """The three splits, by the md5 of the text, without exact duplicates.

    Args:
        sdist: The bytes of the source distribution.

    Returns:
        Split name -> (text, label, mean rating) in the order of the source.
    """
    splits: dict[str, list[tuple[str, str, str]]] = {name: [] for name in NUM_ROWS}
    seen: set[str] = set()
    for line in member_bytes(member_bytes(sdist, INNER), RATINGS).decode().splitlines():
        _, rating, raw_text = line.split("\t")
        text = " ".join(raw_text.split())
        if abs(float(rating)) < LEAST_RATING or text in seen:
            continue
        seen.add(text)
        split = {0: "test", 1: "valid"}.get(md5_bucket(text, 10), "train")
        splits[split].append((text, str(int(float(rating) > 0)), f"{float(rating):.4f}"))
    return splits


def checked_sdist(given: Path | None, scratch: Path) -> bytes:
    """The file given, or else the one that pip downloads; either must be the pinned one."""
    if given is None:
        command = ["pip", "download", "--quiet", "--no-deps", "--no-binary", PACKAGE, f"{PACKAGE}=={VERSION}"]
        subprocess.run([sys.executable, "-m", *command], cwd=scratch, check=True)
        given = scratch / f"{PACKAGE}-{VERSION}.tar.gz"
    content = given.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise ValueError(f"{PACKAGE}: {given} has sha256 {found}, expected {SHA256}; give version {VERSION}")
    return content


def main() -> None:
    """Reads the command line, extracts and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sdist", type=Path, help=f"{PACKAGE}-{VERSION}.tar.gz")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "vader_movie")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        write_corpus(arguments.out, extract(checked_sdist(arguments.sdist, Path(scratch))), num_rows=NUM_ROWS)


if __name__ == "__main__":
    main()
