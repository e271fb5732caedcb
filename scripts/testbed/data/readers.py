"""The layouts of local folders: each reader gives, split by split, (place, row) with the canonical columns.

A split named "all" has yet to be cut into train, valid and test; see splits.py.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from scripts.testbed.data import m2
from scripts.testbed.data.files import (
    Located,
    aligned_lines_of,
    cells_of,
    json_rows_of,
    lines_of,
    parsed_json,
    text_of,
)
from scripts.testbed.data.grammar_noise import noisy
from scripts.testbed.data.tasks import Row

Splits = dict[str, Iterable[Located]]
Reader = Callable[[Path], Splits]
BROWN = Path(__file__).parent.parent / "corpora" / "brown_gec"
BEA_TRAIN = "ABC.train.gold.bea19.m2"
BEA_DEV = "ABCN.dev.gold.bea19.m2"
BEA_MORE = ("fce.train.gold.bea19.m2", "lang8.train.auto.bea19.m2", "nucle.train.gold.bea19.m2")
CONLL14 = "official-2014.combined.m2"


def libreoffice_help_de_en(root: Path) -> Splits:
    """German TAB English, under xz."""

    def rows(split: str) -> Iterator[Located]:
        for place, (german, english) in cells_of(root / f"{split}.tsv.xz", ("German", "English")):
            yield place, {"source": german, "target": english}

    return {split: rows(split) for split in ("train", "valid", "test")}


def vader_movie(root: Path) -> Splits:
    """Text TAB label TAB mean rating, under xz; the sign of the rating is the label."""

    def rows(split: str) -> Iterator[Located]:
        for place, (text, label, rating) in cells_of(root / f"{split}.tsv.xz", ("text", "label", "rating")):
            if label != str(int(not rating.startswith("-"))):
                raise ValueError(f"{place}: label {label} contradicts the rating {rating}; 1 is positive, 0 negative")
            yield place, {"text": text, "label": label}

    return {split: rows(split) for split in ("train", "valid", "test")}


def sst2(root: Path) -> Splits:
    """Text TAB label."""

    def rows(split: str) -> Iterator[Located]:
        for place, (text, label) in cells_of(root / f"{split}.tsv", ("text", "label")):
            yield place, {"text": text, "label": label}

    return {"train": rows("train"), "valid": rows("dev"), "test": rows("test")}


def cola(root: Path) -> Splits:
    """Source TAB label TAB mark TAB sentence; the public in-domain development split is the test split."""
    columns = ("source", "label", "mark", "sentence")

    def rows(split: str) -> Iterator[Located]:
        for place, cells in cells_of(root / f"in_domain_{split}.tsv", columns, blank=("mark",)):
            yield place, {"text": cells[3], "label": cells[1]}

    return {"train": rows("train"), "test": rows("dev")}


def mrpc(root: Path) -> Splits:
    """A header, then label TAB two ids TAB two sentences."""
    columns = ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String")

    def rows(split: str) -> Iterator[Located]:
        for place, cells in cells_of(root / f"{split}.tsv", columns, header=True):
            yield place, {"text": cells[3].strip(), "text_pair": cells[4].strip(), "label": cells[0]}

    return {"train": rows("train"), "valid": rows("val"), "test": rows("test")}


def wnut17(root: Path) -> Splits:
    """CoNLL columns, token TAB tag; a line without either ends a sentence."""

    def rows(file: str) -> Iterator[Located]:
        tokens: list[str] = []
        tags: list[str] = []
        start = ""
        for place, line in [*lines_of(root / file), (f"{root / file}:end", "")]:
            if not line.strip():
                if tokens:
                    yield start, {"tokens": tokens, "tags": tags}
                tokens, tags = [], []
                continue
            cells = line.split("\t")
            if len(cells) != 2 or not all(cells):
                raise ValueError(f"{place}: {line[:60]!r} is not token TAB tag, nor an empty line")
            start = start if tokens else place
            tokens.append(cells[0])
            tags.append(cells[1].strip())

    return {"train": rows("train.conll"), "valid": rows("dev.conll"), "test": rows("test.annotated")}


def xquad(root: Path) -> Splits:
    """The SQuAD format: data, paragraphs, questions, answers."""
    path = root / "xquad.en.json"

    def rows() -> Iterator[Located]:
        place = str(path)
        try:
            for a, article in enumerate(parsed_json(place, text_of(path))["data"]):
                for p, paragraph in enumerate(article["paragraphs"]):
                    for q, entry in enumerate(paragraph["qas"]):
                        place = f"{path}: data[{a}].paragraphs[{p}].qas[{q}]"
                        found = [(answer["text"], answer["answer_start"]) for answer in entry["answers"]]
                        answers = {"text": [text for text, _ in found], "answer_start": [start for _, start in found]}
                        row = {"id": entry["id"], "context": paragraph["context"], "question": entry["question"]}
                        yield place, {**row, "answers": answers}
        except (KeyError, TypeError) as error:
            raise ValueError(f"{place}: here or after it not in the SQuAD format ({error!r})") from error

    return {"all": rows()}


def multi30k(root: Path) -> Splits:
    """One file a language, aligned line by line, under gzip."""

    def rows(split: str) -> Iterator[Located]:
        files = (root / f"{split}.de.gz", root / f"{split}.en.gz")
        for place, (german, english) in aligned_lines_of(files):
            yield place, {"source": german, "target": english}

    return {"train": rows("train"), "valid": rows("val"), "test": rows("test_2016_flickr")}


def jfleg_row(row: Row) -> Row:
    """One sentence of the hub and its corrections, without the blanks at their ends, as the lines of a folder are."""
    sentence, corrections = row.get("sentence"), row.get("corrections")
    if not isinstance(sentence, str) or not isinstance(corrections, list) or not corrections:
        raise ValueError("sentence, corrections: not a text and a list of texts")
    references = [str(correction).strip() for correction in corrections]
    return {"source": sentence.strip(), "target": references[0], "references": references}


def jfleg(root: Path) -> Splits:
    """One file of sources and four of references, aligned line by line; there is no training split."""

    def rows(split: str) -> Iterator[Located]:
        files = (root / f"{split}.src", *(root / f"{split}.ref{number}" for number in range(4)))
        for place, (source, *references) in aligned_lines_of(files):
            yield place, {"source": source, "target": references[0], "references": references}

    return {"valid": rows("dev"), "test": rows("test")}


def scitldr_row(row: Row) -> Row:
    """One paper, here and on the hub: its sentences joined, and all its summaries, the first of which is the target."""
    for column in ("source", "target"):
        if not isinstance(row.get(column), list) or not all(isinstance(text, str) for text in row[column]):
            raise ValueError(f"{column}: not a list of texts")
    if not row["target"]:
        raise ValueError("target: no summary")
    return {"source": " ".join(row["source"]), "target": row["target"][0], "references": row["target"]}


def scitldr(root: Path) -> Splits:
    """JSON lines under gzip: source, a list of sentences, and target, a list of summaries."""

    def rows(split: str) -> Iterator[Located]:
        for place, row in json_rows_of(root / f"{split}.jsonl.gz"):
            try:
                yield place, scitldr_row(row)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error

    return {"train": rows("train"), "valid": rows("dev"), "test": rows("test")}


def brown_gec(root: Path) -> Splits:
    """One sentence a line, under xz; its artificial errors are made here, so the source is what a learner may write."""

    def rows(split: str) -> Iterator[Located]:
        for place, (sentence,) in cells_of(root / f"{split}.tsv.xz", ("sentence",)):
            yield place, {"source": noisy(sentence), "target": sentence, "references": [sentence]}

    return {split: rows(split) for split in ("train", "valid", "test")}


def brown_jfleg(root: Path) -> Splits:
    """The shipped sentences with artificial errors to train on; JFLEG's, which learners wrote, to choose and score."""
    return {"train": brown_gec(BROWN)["train"], **jfleg(root)}


def bea_train(root: Path) -> Iterator[Located]:
    """W&I's training file, and behind it those of the shared task's other training sets that lie beside it."""
    for file in (BEA_TRAIN, *(file for file in BEA_MORE if (root / file).is_file())):
        yield from m2.rows_of(root / file)


def bea2019(root: Path) -> Splits:
    """M2 files of the shared task; its development split is the test split, for the answers to its test are secret."""
    return {"train": bea_train(root), "test": m2.rows_of(root / BEA_DEV)}


def conll14(root: Path) -> Splits:
    """BEA-2019 to train on and choose by; CoNLL-2014's essays, corrected by two annotators, to score."""
    return {"train": bea_train(root), "valid": m2.rows_of(root / BEA_DEV), "test": m2.rows_of(root / CONLL14)}


def debian_synopses(root: Path) -> Splits:
    """Description TAB synopsis, under xz."""

    def rows(split: str) -> Iterator[Located]:
        for place, (text, synopsis) in cells_of(root / f"{split}.tsv.xz", ("description", "synopsis")):
            yield place, {"source": text, "target": synopsis, "references": [synopsis]}

    return {split: rows(split) for split in ("train", "valid", "test")}
