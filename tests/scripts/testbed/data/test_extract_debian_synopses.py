import subprocess
from pathlib import Path

import pytest

from scripts.testbed.corpora import extract_debian_synopses as debian
from scripts.testbed.data import DataConfig, load


def described(name: str, synopsis: str, *lines: str, field: str = "Description-en", source: str = "") -> str:
    head = f"Package: {name}\n" + (f"Source: {source} (1.0)\n" if source else "")
    return head + f"{field}: {synopsis}\n" + "".join(f" {line}\n" for line in lines) + "Homepage: x\n\n"


WORDS = "is a long enough text of more than twelve words about this package"
# enough packages that every split has some
MANY = "".join(described(f"pkg{n}", f"tool number{n}", f"Program {n} {WORDS}", source=f"src{n}") for n in range(80))


def pairs_of(*indexes: str) -> list[tuple[str, str]]:
    pairs = [pair for rows in debian.extract([*indexes, MANY]).values() for pair in rows]
    return [pair for pair in pairs if not pair[1].startswith("tool number")]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (("One line", "goes  on.", ".", "Then more."), "One line goes on. Then more."),
        (("Before:", "  * verbatim", "\tverbatim", "after."), "Before: after."),
    ],
)
def test_the_prose_of_a_description(lines: tuple[str, ...], expected: str) -> None:
    assert debian.prose(f" {line}" for line in lines) == expected


def test_synopses_come_with_descriptions_from_a_status_file_or_from_an_archives_two_indexes() -> None:
    expected = [(f"It {WORDS}", "the synopsis")]
    assert pairs_of(described("a", "the synopsis", f"It {WORDS}", field="Description")) == expected
    packages = "Package: a\nSource: s\nDescription: the synopsis\nDescription-md5: 1\n\n"
    assert pairs_of(packages, described("a", "the synopsis", f"It {WORDS}")) == expected


def test_short_texts_and_repeats_are_left_out() -> None:
    kept = described("a", "a good synopsis", f"First {WORDS} {'and on ' * 30}", ".", "Tools.")
    dropped = (
        described("b", "another synopsis", f"First {WORDS} {'and on ' * 30}", ".", "Library."),  # begins alike
        described("c", "A good, synopsis!", f"Other {WORDS}"),
        described("d", "word", f"Yet another {WORDS}"),
        described("e", "too little text", "Only this."),
        described("f", "too much text", "word " * 301),
    )
    assert [synopsis for _, synopsis in pairs_of(kept, *dropped)] == ["a good synopsis"]


def test_packages_of_one_source_are_in_one_split() -> None:
    index = "".join(described(f"p{n}", f"part {n}", f"Part {n} {WORDS}", source="whole") for n in range(40))
    splits = debian.extract([index, MANY])
    assert sorted(sum(synopsis.startswith("part") for _, synopsis in rows) for rows in splits.values()) == [0, 0, 40]


def test_an_index_without_enough_descriptions_is_refused() -> None:
    with pytest.raises(ValueError, match=r"index: the splits would have {'train': 0.*give an archive's Packages"):
        debian.extract([""])


def test_without_apt_an_index_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"index: apt-get could not fetch one .*give --index FILE"):
        debian.fetched(tmp_path)


def test_the_largest_index_that_apt_fetches_is_taken_with_its_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def update(command: list[str], **_: object) -> None:
        lists = Path(next(part for part in command if "lists=" in part).partition("=")[2])
        for archive, text in (("deb_main", MANY), ("deb-updates_main", "")):
            for kind in ("i18n_Translation-en", "binary-amd64_Packages"):
                (lists / f"{archive}_{kind}").write_text(text)

    monkeypatch.setattr(subprocess, "run", update)
    names = [path.name for path in debian.fetched(tmp_path)]
    assert names == ["deb_main_binary-amd64_Packages", "deb_main_i18n_Translation-en"]


def test_what_the_command_writes_is_the_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "status").write_text(MANY)
    monkeypatch.setattr("sys.argv", ["extract", "--out", str(tmp_path / "set"), "--index", str(tmp_path / "status")])
    debian.main()
    data = load(DataConfig(name="debian_synopses", root=str(tmp_path / "set")))
    assert len(data.train) + len(data.valid) + len(data.test) == 80
    assert data.train["target"][0].startswith("tool number")
