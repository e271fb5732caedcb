"""The M2 format of corrected sentences: a source, the edits of one or more annotators, and an empty line.

    S This are a sentence .
    A 1 2|||R:VERB:SVA|||is|||REQUIRED|||-NONE-|||0

An edit names the source's tokens that it replaces, its type, its text and its annotator.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from scripts.testbed.data.files import Located, lines_of
from scripts.testbed.data.tasks import Row

NOT_CORRECTIONS = ("noop", "UNK", "Um")  # nothing to correct, and what the annotator could not mend
LAYOUT = "A start end|||type|||correction|||REQUIRED|||-NONE-|||annotator"

Edit = tuple[int, int, str]  # (first token, the one behind the last, correction)


def rows_of(path: Path) -> Iterator[Located]:
    """Every sentence with its corrections, one an annotator, in the order of their numbers.

    Args:
        path: An M2 file.

    Yields:
        (place, row); a sentence that nobody annotated is its own correction.

    Raises:
        ValueError: A line is none of the format's, or an edit lies outside its sentence.
    """
    start = ""
    tokens: list[str] = []
    edits: dict[int, list[Edit]] = {}
    for place, line in [*lines_of(path), (f"{path}:end", "")]:
        if line == "S" or line.startswith("S "):
            if start:
                raise ValueError(f"{place}: a sentence without an empty line before it")
            start, tokens, edits = place, line[2:].split(), {}
        elif line.startswith("A ") and start:
            annotator, edit = edit_of(place, line, len(tokens))
            edits.setdefault(annotator, []).extend(edit)
        elif line.strip():
            raise ValueError(f"{place}: {line[:60]!r} is neither S and a sentence, nor {LAYOUT} below one")
        elif start:
            yield start, row_of(tokens, [edits[annotator] for annotator in sorted(edits)] or [[]])
            start = ""


def edit_of(place: str, line: str, num_tokens: int) -> tuple[int, list[Edit]]:
    """The annotator of a line and the correction on it, the first of several; none where it corrects nothing."""
    cells = line.removeprefix("A ").split("|||")
    try:
        (first, end), annotator = map(int, cells[0].split()), int(cells[5])
    except (ValueError, IndexError) as error:
        raise ValueError(f"{place}: {line[:60]!r} is not {LAYOUT}") from error
    if cells[1] in NOT_CORRECTIONS:
        return annotator, []
    if not 0 <= first <= end <= num_tokens:
        raise ValueError(f"{place}: tokens {first} to {end} of a sentence of {num_tokens}")
    return annotator, [(first, end, cells[2].partition("||")[0])]


def row_of(tokens: Sequence[str], annotations: Sequence[Sequence[Edit]]) -> Row:
    """The canonical row of a sentence."""
    references = [corrected(tokens, edits) for edits in annotations]
    return {"source": " ".join(tokens), "target": references[0], "references": references}


def corrected(tokens: Sequence[str], edits: Iterable[Edit]) -> str:
    """The sentence with its edits made from left to right, as errant makes them, also where they overlap."""
    found, shift = list(tokens), 0
    for first, end, text in sorted(edits, key=lambda edit: edit[:2]):
        words = text.split()
        found[first + shift : end + shift] = words
        shift += len(words) - (end - first)
    return " ".join(found)
