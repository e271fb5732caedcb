from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.testbed.data.m2 import corrected, rows_of
from scripts.testbed.data.tasks import Row


def edit(span: str, correction: str, *, kind: str = "R:OTHER", annotator: int = 0) -> str:
    return f"A {span}|||{kind}|||{correction}|||REQUIRED|||-NONE-|||{annotator}\n"


def rows(tmp_path: Path, text: str) -> list[Row]:
    path = tmp_path / "a.m2"
    path.write_text(text)
    return [row for _, row in rows_of(path)]


def references(tmp_path: Path, *edits: str) -> list[str]:
    (row,) = rows(tmp_path, "S a b c\n" + "".join(edits))
    assert (row["source"], row["target"]) == ("a b c", row["references"][0])
    return list(row["references"])


@pytest.mark.parametrize(
    ("edits", "expected"),
    [
        ([], "a b c"),
        ([edit("-1 -1", "-NONE-", kind="noop")], "a b c"),
        ([edit("1 2", "x y")], "a x y c"),
        ([edit("1 2", "")], "a c"),
        ([edit("0 0", "x"), edit("3 3", ".")], "x a b c ."),
        ([edit("2 3", "z"), edit("0 1", "")], "b z"),  # in any order
        ([edit("0 3", "x||y")], "x"),  # the first of several
        ([edit("0 1", "x", kind="UNK"), edit("1 2", "y", kind="Um")], "a b c"),  # found, not mended
        ([edit("0 3", "")], ""),
    ],
)
def test_edits_are_made(tmp_path: Path, edits: list[str], expected: str) -> None:
    assert references(tmp_path, *edits) == [expected]


def test_every_annotator_gives_a_reference_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    found = references(tmp_path, edit("0 1", "x", annotator=2), edit("1 2", "y"), edit("2 3", "z", annotator=2))
    assert found == ["a y c", "x b z"]


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["", "x", "x y"])), max_size=4))
def test_insertions_add_their_words_alone(insertions: list[tuple[int, str]]) -> None:
    found = corrected(["a", "b", "c"], [(place, place, text) for place, text in insertions])
    assert [word for word in found.split() if word in "abc"] == ["a", "b", "c"]
    assert len(found.split()) == 3 + sum(len(text.split()) for _, text in insertions)


def test_sentences_end_at_empty_lines_or_at_the_files_end(tmp_path: Path) -> None:
    found = rows(tmp_path, f"S one\n\n\nS \n\nS\n\nS two three\n{edit('0 1', '2')}")
    assert [(row["source"], row["target"]) for row in found] == [
        ("one", "one"),
        ("", ""),
        ("", ""),
        ("two three", "2 three"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("S a\nS b\n", "m2:2: a sentence without an empty line before it"),
        (edit("0 1", "x"), "m2:1: 'A 0 1.*' is neither S and a sentence, nor A start end"),
        ("S a\nB\n", "m2:2: 'B' is neither"),
        ("S a\nA 0 x|||T|||x|||REQUIRED|||-NONE-|||0\n", "m2:2: .* is not A start end"),
        ("S a\nA 0 1 2|||T|||x|||REQUIRED|||-NONE-|||0\n", "m2:2: .* is not A start end"),
        ("S a\nA 0 1|||T|||x\n", "m2:2: .* is not A start end"),
        ("S a\n" + edit("0 2", "x"), "m2:2: tokens 0 to 2 of a sentence of 1"),
        ("S a b\n" + edit("2 1", "x"), "m2:2: tokens 2 to 1 of a sentence of 2"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rows(tmp_path, text)
