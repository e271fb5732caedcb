"""Extracts the German-English sentence pairs of the LibreOffice help from its two Debian packages.

    python -m scripts.testbed.corpora.extract_libreoffice_help [--german DEB --english DEB] [--out FOLDER]

Both packages hold the same HTML files with the same paragraph ids. A pair is the two paragraphs of one id, or their
sentences one by one where both sides have equally many. Without arguments `apt-get download` fetches the packages.
"""

import argparse
import hashlib
import html.parser
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from scripts.testbed.corpora.pack import md5_bucket, write_corpus

VERSION = "4:7.4.7-1+deb12u14"
SHA256 = {
    "libreoffice-help-de": "00490b63c509ac96f7f212d6a6e40452d3e0d1f97ccf4b824dd5ec4c01e8277f",
    "libreoffice-help-en-us": "8faa840285734d6cfe1ed25537b48f07e74bd6412e3917bf8e5f8a653f7b3712",
}
NUM_ROWS = {"train": 32_825, "valid": 1_732, "test": 1_595}

PARAGRAPH = re.compile(r'<(p|h[1-6])\b([^>]*\bid="([^"]+)"[^>]*)>(.*?)</\1>', re.DOTALL)
CODE = re.compile(r'class="(?:code|codeintable|smathcode)"')
SENTENCE_END = re.compile(r'(?<=[.!?])\s+(?=["„“(]?[A-ZÄÖÜ])')
ABBREVIATION = re.compile(r"(?:\b[A-Za-z]|\b(?:bzw|ca|etc|evtl|ggf|inkl|max|min|No|Nr|resp|sog|usw|vgl|vs))\.$")
STRAY_BLANK = re.compile(r"(?<=\w) (?=[.,](?: |$))")

Key = tuple[str, str]  # (file, paragraph id)
Pair = tuple[str, str]  # (German, English)


class VisibleText(html.parser.HTMLParser):
    """Collects what a reader sees: of a switch between systems or modules its default, else its first alternative."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.texts = [""]  # the innermost open switch or alternative is last
        self.open_spans: list[str] = []
        self.alternatives: list[dict[str, str]] = []  # of each open switch

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Opens a switch, one of its alternatives or a plain span; line breaks and icons leave a blank."""
        attributes = dict(attrs)
        if tag in ("br", "img"):
            self.texts[-1] += " "
        if tag != "span":
            return
        if attributes.get("class") == "switchinline":
            self.alternatives.append({})
            self.open_spans.append("switch")
            self.texts.append("")
        elif "hidden" in attributes and self.alternatives:
            self.open_spans.append(attributes.get("class") or "default")
            self.texts.append("")
        else:
            self.open_spans.append("")

    def handle_endtag(self, tag: str) -> None:
        """Closes what the matching start opened; a closing switch hands its chosen alternative outwards."""
        if tag != "span" or not self.open_spans:
            return
        kind = self.open_spans.pop()
        if kind == "switch":
            self.texts.pop()
            choices = self.alternatives.pop()
            self.texts[-1] += choices.get("default") or next((text for text in choices.values() if text), "")
        elif kind:
            self.alternatives[-1].setdefault(kind, self.texts.pop().strip("\n"))

    def handle_data(self, data: str) -> None:
        """Adds text to the innermost open alternative."""
        self.texts[-1] += data


def visible_text(inner: str) -> str:
    """The text of one paragraph's HTML, with single blanks and none that an icon left before a full stop."""
    parser = VisibleText()
    parser.feed(inner)
    parser.close()
    text = " ".join("".join(parser.texts).replace("\u00ad", "").split())
    return STRAY_BLANK.sub("", text)


def paragraphs(package: Path, language: str) -> Iterator[tuple[Key, str]]:
    """Every paragraph of one help package in the package's order; nothing is unpacked to disk."""
    folder = f"./usr/share/libreoffice/help/{language}/text/"
    unpacking = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE)
    with unpacking, tarfile.open(fileobj=unpacking.stdout, mode="r|") as archive:
        for member in archive:
            if member.isfile() and member.name.startswith(folder) and member.name.endswith(".html"):
                content = archive.extractfile(member)
                assert content is not None, member.name
                for _, attributes, paragraph, inner in PARAGRAPH.findall(content.read().decode()):
                    if not CODE.search(attributes):
                        yield (member.name.removeprefix(folder), paragraph), visible_text(inner)


def sentences(paragraph: str) -> list[str]:
    """Cuts after . ! ? before a capital, except after single letters and common abbreviations."""
    found: list[str] = []
    for piece in SENTENCE_END.split(paragraph):
        if found and ABBREVIATION.search(found[-1]):
            found[-1] += " " + piece
        else:
            found.append(piece)
    return found


def aligned(german: str, english: str) -> list[Pair]:
    """The sentences of two paragraphs one by one if there are equally many, else the paragraphs as one pair."""
    sides = sentences(german), sentences(english)
    return list(zip(*sides, strict=True)) if len(sides[0]) == len(sides[1]) else [(german, english)]


def is_clean(german: str, english: str) -> bool:
    """3 to 80 words a side, at most 2.2 times as many on one side, not the same text, more than 60 % letters."""
    lengths = (len(german.split()), len(english.split()))
    letters = sum(character.isalpha() or character == " " for character in english)
    return (
        min(lengths) >= 3
        and max(lengths) <= min(80, 2.2 * min(lengths))
        and german != english
        and letters > 0.6 * len(english)
    )


def normalised(text: str) -> str:
    """Letters and digits alone, in one case: what makes two sentences the same for the leak check."""
    return "".join(character for character in text.casefold() if character.isalnum())


def extract(german_package: Path, english_package: Path) -> dict[str, list[Pair]]:
    """The three splits: cut by file, then freed of duplicates and of sentences that an evaluation split holds.

    Args:
        german_package: The .deb of the German help.
        english_package: The .deb of the English help, of the same version.

    Returns:
        Split name -> (German, English) pairs in the order of the English package.
    """
    german: dict[Key, str] = {}
    for key, text in paragraphs(german_package, "de"):
        german.setdefault(key, text)
    split_of: dict[Pair, str] = {}  # a pair belongs to the split of the first file that has it
    for key, text in paragraphs(english_package, "en-US"):
        split = {0: "valid", 1: "test"}.get(md5_bucket(key[0], 20), "train")
        for pair in aligned(german.get(key, ""), text):
            if is_clean(*pair):
                split_of.setdefault(pair, split)
    splits: dict[str, list[Pair]] = {}
    taken: set[str] = set()
    for split in ("valid", "test", "train"):
        candidates = [pair for pair, its_split in split_of.items() if its_split == split]
        splits[split] = [pair for pair in candidates if taken.isdisjoint(map(normalised, pair))]
        taken.update(normalised(side) for pair in splits[split] for side in pair)
    return {split: splits[split] for split in NUM_ROWS}


def checked_package(name: str, given: Path | None, scratch: Path) -> Path:
    """The package file given, or else the one that apt downloads; either must be the pinned one."""
    if given is None:
        subprocess.run(["apt-get", "download", "-qq", f"{name}={VERSION}"], cwd=scratch, check=True)
        given = next(scratch.glob(f"{name}_*.deb"))
    found = hashlib.sha256(given.read_bytes()).hexdigest()
    if found != SHA256[name]:
        raise ValueError(f"{name}: {given} has sha256 {found}, expected {SHA256[name]}; give version {VERSION}")
    return given


def main() -> None:
    """Reads the command line, extracts and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--german", type=Path, help=f"libreoffice-help-de_{VERSION}_all.deb")
    parser.add_argument("--english", type=Path, help=f"libreoffice-help-en-us_{VERSION}_all.deb")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "libreoffice_help_de_en")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        german = checked_package("libreoffice-help-de", arguments.german, Path(scratch))
        english = checked_package("libreoffice-help-en-us", arguments.english, Path(scratch))
        write_corpus(arguments.out, extract(german, english), num_rows=NUM_ROWS)


if __name__ == "__main__":
    main()
