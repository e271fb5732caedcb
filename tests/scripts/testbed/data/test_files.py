import gzip
import lzma
from pathlib import Path

import pytest

from scripts.testbed.data import files


def written(path: Path, text: str | bytes) -> Path:
    content = text if isinstance(text, bytes) else text.encode()
    pack = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
    path.write_bytes(pack(content))
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.gz", "a.xz"])
def test_only_line_feeds_end_a_line(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / name, "\ufeffone\r\ntwo\u2028\x85still\n\nfour")
    assert files.lines_of(path) == [
        (f"{path}:1", "one"),
        (f"{path}:2", "two\u2028\x85still"),
        (f"{path}:3", ""),
        (f"{path}:4", "four"),
    ]


def test_an_empty_file_has_no_lines(tmp_path: Path) -> None:
    assert files.lines_of(written(tmp_path / "a", "")) == []


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none: no such file"):
        files.text_of(tmp_path / "none")
    with pytest.raises(ValueError, match="latin:2: not UTF-8"):
        files.text_of(written(tmp_path / "latin", "good\nb\xe4d".encode("latin-1")))
    for name, content in (
        ("a.gz", b"plain"),
        ("b.gz", gzip.compress(b"x" * 99)[:-12]),
        ("c.xz", b"plain"),
        ("d.xz", lzma.compress(b"x" * 99)[:-12]),
        ("e.gz", gzip.compress(b"x" * 99)[:10] + b"\xff" * 20),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}: damaged .*get the file again"):
            files.text_of(tmp_path / name)


def test_a_file_that_unpacks_to_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "a.xz", "x" * 100)
    monkeypatch.setattr(files, "MAX_TEXT_BYTES", 100)
    assert files.text_of(path) == "x" * 100
    monkeypatch.setattr(files, "MAX_TEXT_BYTES", 99)
    with pytest.raises(ValueError, match="more than 99 bytes"):
        files.text_of(path)


def test_cells(tmp_path: Path) -> None:
    path = written(tmp_path / "a", 'x\ty\n"1\t2"\n\t4\n')
    cells = list(files.cells_of(path, ("x", "y"), header=True, blank=("x",)))
    assert cells == [(f"{path}:2", ['"1', '2"']), (f"{path}:3", ["", "4"])]


@pytest.mark.parametrize(
    ("text", "header", "message"),
    [
        ("1\t2\n3\n", False, "a:2: 1 columns, expected 2: x TAB y"),
        ("1\t2\t3\n", False, "a:1: 3 columns"),
        ("1\t \n", False, "a:1: y is empty"),
        ("1\t2\n", True, "a:1: the header is not x TAB y"),
        ("", True, "a:1: the header is not"),
    ],
)
def test_a_table_of_another_shape(tmp_path: Path, text: str, header: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(files.cells_of(written(tmp_path / "a", text), ("x", "y"), header=header))


def test_aligned_lines(tmp_path: Path) -> None:
    one, two = written(tmp_path / "one", "a \nb\n"), written(tmp_path / "two", "c\nd\n")
    assert [texts for _, texts in files.aligned_lines_of((one, two))] == [["a", "c"], ["b", "d"]]
    with pytest.raises(ValueError, match=r"not aligned line by line: .*1"):
        list(files.aligned_lines_of((one, written(tmp_path / "three", "c\n"))))
    with pytest.raises(ValueError, match="four:2: empty line"):
        list(files.aligned_lines_of((one, written(tmp_path / "four", "c\n \n"))))


def test_json_lines(tmp_path: Path) -> None:
    path = written(tmp_path / "a", '{"x": 1}\n{"x": "\u2028"}\n')
    assert [row for _, row in files.json_rows_of(path)] == [{"x": 1}, {"x": "\u2028"}]
    for text, message in (
        ('{"x": 1}\n{"x"\n', "a:2: not JSON"),
        ("[1]\n", "a:1: not a JSON object"),
        ("\n", "a:1: not JSON"),
        ("[" * 100_000 + "\n", "a:1: not JSON"),
    ):
        with pytest.raises(ValueError, match=message):
            list(files.json_rows_of(written(path, text)))


def test_csv(tmp_path: Path) -> None:
    path = written(tmp_path / "a", 'x,y\n1,"two,\nlines"\n')
    assert list(files.csv_rows_of(path)) == [(f"{path}:3", {"x": "1", "y": "two,\nlines"})]
    for text, message in (
        ("x,y\n1\n", "a:2: not one value a column"),
        ("x,y\n1,2,3\n", "a:2: not one value a column"),
        ('x,y\n1,"2\n', "a:.: not CSV"),
    ):
        with pytest.raises(ValueError, match=message):
            list(files.csv_rows_of(written(path, text)))
