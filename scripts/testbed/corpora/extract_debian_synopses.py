"""Extracts descriptions of Debian packages and their one-line synopses, for summarisation; the texts do not ship.

    python -m scripts.testbed.corpora.extract_debian_synopses --out FOLDER [--index FILE ...]

Without an index, apt fetches the main archive's Packages and Translation-en into a scratch folder, which needs Debian
and leaves the machine's own lists alone; of Debian 12 come 36,910 pairs for training, 2,019 and 2,099.
/var/lib/dpkg/status is an index too: that of the installed packages.
"""

import argparse
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from scripts.testbed.corpora.pack import md5_bucket, write_corpus
from scripts.testbed.data.files import text_of

FEWEST_WORDS, MOST_WORDS = 12, 300
FEWEST_SYNOPSIS_WORDS = 2
KEY_LETTERS = 120  # families of packages differ in what follows
NUM_BUCKETS = 20
TRANSLATION = "_i18n_Translation-en"

Stanza = dict[str, list[str]]  # field -> its lines
Pair = tuple[str, str]  # (description, synopsis)


def stanzas(text: str) -> Iterator[Stanza]:
    """The paragraphs of a control file, field by field, without the line that only goes on."""
    for block in text.split("\n\n"):
        stanza: Stanza = {}
        lines: list[str] = []
        for line in block.splitlines():
            if line.startswith((" ", "\t")):
                lines.append(line)
            else:
                field, _, value = line.partition(":")
                lines = stanza[field] = [value.strip()]
        if stanza:
            yield stanza


def prose(lines: Iterable[str]) -> str:
    """The running text of a description, without what a terminal shows verbatim: lists and tables."""
    return " ".join(" ".join(line.split()) for line in lines if line[1:2] not in (" ", "\t") and line.strip() != ".")


def letters(text: str) -> str:
    """Letters and digits alone, in one case: what makes two texts the same."""
    return "".join(character for character in text.casefold() if character.isalnum())


def extract(indexes: Iterable[str]) -> dict[str, list[Pair]]:
    """The three splits, by source package, without descriptions that begin alike or synopses that are the same.

    Args:
        indexes: Texts of control files: dpkg's status, or an archive's Packages and Translation-en, which hold the
            source packages and the descriptions.

    Returns:
        Split name -> (description, synopsis) pairs in the order of the packages' names.

    Raises:
        ValueError: The indexes leave a split empty.
    """
    sources: dict[str, str] = {}
    descriptions: dict[str, list[str]] = {}
    for stanza in (stanza for text in indexes for stanza in stanzas(text)):
        for name in stanza.get("Package", ()):
            if "Source" in stanza:
                sources[name] = stanza["Source"][0].partition(" ")[0]
            lines = stanza.get("Description-en") or stanza.get("Description") or []
            if len(lines) > 1:
                descriptions.setdefault(name, lines)
    splits: dict[str, list[Pair]] = {"train": [], "valid": [], "test": []}
    seen: set[str] = set()
    for name, (synopsis, *rest) in sorted(descriptions.items()):
        description = prose(rest)
        keys = {letters(description)[:KEY_LETTERS], letters(synopsis)}
        fits = FEWEST_WORDS <= len(description.split()) <= MOST_WORDS
        if fits and len(synopsis.split()) >= FEWEST_SYNOPSIS_WORDS and seen.isdisjoint(keys):
            seen |= keys
            bucket = md5_bucket(sources.get(name, name), NUM_BUCKETS)
            splits[{0: "valid", 1: "test"}.get(bucket, "train")].append((description, " ".join(synopsis.split())))
    if not all(splits.values()):
        counts = {split: len(pairs) for split, pairs in splits.items()}
        raise ValueError(f"index: the splits would have {counts} rows; give an archive's Packages and Translation-en")
    return splits


def fetched(scratch: Path) -> list[Path]:
    """The main archive's indexes, which stay the same for the life of a release, unlike those of its updates."""
    lists = scratch / "lists"
    (lists / "partial").mkdir(parents=True)
    scratch.chmod(0o755)  # apt downloads as a user of its own
    options = (f"Dir::State::lists={lists}", f"Dir::Cache={scratch}", "Acquire::Languages=en", "Acquire::GzipIndexes=0")
    flags = [flag for option in options for flag in ("-o", option)]
    try:
        subprocess.run(["apt-get", "--quiet=2", *flags, "update"], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"index: apt-get could not fetch one ({error}); give --index FILE, from any Debian") from error
    found = sorted(lists.glob(f"*{TRANSLATION}"), key=lambda path: path.stat().st_size)
    if not found:
        raise ValueError("index: apt knows of no archive with Translation-en; give --index FILE, from any Debian")
    archive = found[-1].name.removesuffix(TRANSLATION)
    return [*sorted(lists.glob(f"{archive}_binary-*_Packages")), found[-1]]


def main() -> None:
    """Reads the command line, extracts and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder that data.root will name")
    parser.add_argument("--index", type=Path, nargs="+", help="control files, plain or under gzip or xz")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        indexes = arguments.index or fetched(Path(scratch))
        splits = extract(text_of(index) for index in indexes)
    write_corpus(arguments.out, splits, num_rows={split: len(pairs) for split, pairs in splits.items()})


if __name__ == "__main__":
    main()
