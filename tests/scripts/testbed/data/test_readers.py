"""Every local layout on files of two or three rows, and what each reader says of a broken one."""

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.testbed.data import DATA_SETS, Data, DataConfig, DataError, load

SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": f"article {a} paragraph {p}",
                    "qas": [
                        {"id": f"{a}.{p}", "question": "what?", "answers": [{"text": "article", "answer_start": 0}]}
                    ],
                }
                for p in range(5)
            ]
        }
        for a in range(12)
    ]
}
PAPER = json.dumps({"source": ["One.", "Two."], "target": ["Short.", "Shorter."]}) + "\n"
TAGGED = "A\tO\nMan\tB-person\n\t\n\nB\tO\n"
MRPC = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t2\t3\ta \tb\r\n"
JFLEG = {
    f"{s}.{k}": f"{k} one . \n{k} two .\n" for s in ("dev", "test") for k in ("src", "ref0", "ref1", "ref2", "ref3")
}
ESSAYS = "".join(f"S Essay {n} have errors .\nA 2 3|||R:VERB:SVA|||has|||REQUIRED|||-NONE-|||0\n\n" for n in range(60))
TWICE = "S This are fine\nA 1 2|||SVA|||is|||REQUIRED|||-NONE-|||0\nA -1 -1|||noop|||-NONE-|||REQUIRED|||-NONE-|||1\n\n"

FILES: dict[str, dict[str, str]] = {
    "libreoffice_help_de_en": {f"{s}.tsv.xz": "ja\tyes\nnein\tno\n" for s in ("train", "valid", "test")},
    "vader_movie": {f"{s}.tsv.xz": "good\t1\t2.0000\nbad\t0\t-0.6000\n" for s in ("train", "valid", "test")},
    "sst2": {f"{s}.tsv": "good\t1\nbad\t0\n" for s in ("train", "dev", "test")},
    "cola": {
        "in_domain_train.tsv": "".join(f"s\t{n % 2}\t*\tsentence {n}\n" for n in range(60)),
        "in_domain_dev.tsv": "s\t1\t\tgood one\n",
    },
    "mrpc": {f"{s}.tsv": MRPC for s in ("train", "val", "test")},
    "wnut17": dict.fromkeys(("train.conll", "dev.conll", "test.annotated"), TAGGED),
    "xquad": {"xquad.en.json": json.dumps(SQUAD)},
    "multi30k": {f"{s}.{x}.gz": f"{x} 1\n{x} 2\n" for s in ("train", "val", "test_2016_flickr") for x in ("de", "en")},
    "jfleg": JFLEG,
    "brown_gec": {f"{s}.tsv.xz": "one sentence .\nanother one .\n" for s in ("train", "valid", "test")},
    "brown_jfleg": JFLEG,
    "scitldr": {f"{s}.jsonl.gz": PAPER for s in ("train", "dev", "test")},
    "debian_synopses": {f"{s}.tsv.xz": "Long text.\tshort\nMore.\tless\n" for s in ("train", "valid", "test")},
    "bea2019": {"ABC.train.gold.bea19.m2": ESSAYS, "ABCN.dev.gold.bea19.m2": TWICE},
    "conll14": {
        "ABC.train.gold.bea19.m2": ESSAYS,
        "ABCN.dev.gold.bea19.m2": TWICE * 2,
        "official-2014.combined.m2": TWICE,
    },
}
SIZES = {
    **dict.fromkeys(("libreoffice_help_de_en", "vader_movie", "sst2", "wnut17", "multi30k", "brown_gec"), (2, 2, 2)),
    "debian_synopses": (2, 2, 2),
    "bea2019": (54, 6, 1),
    "conll14": (60, 2, 1),
    **dict.fromkeys(("mrpc", "scitldr"), (1, 1, 1)),
    "cola": (53, 7, 1),
    "xquad": (10, 25, 25),
    "jfleg": (0, 2, 2),
    "brown_jfleg": (39_861, 2, 2),
}


def write(root: Path, file: str, text: str) -> None:
    pack: Callable[[bytes], bytes] = {".gz": gzip.compress, ".xz": lzma.compress}.get(Path(file).suffix, bytes)
    (root / file).write_bytes(pack(text.encode()))


def load_written(root: Path, name: str, **changes: str | None) -> Data:
    """Loads the set from a folder with its files, some changed and those given as None left out."""
    for file, text in {**FILES[name], **changes}.items():
        if text is not None:
            write(root, file, text)
    return load(DataConfig(name=name, root=str(root)))


@pytest.mark.parametrize("name", FILES)
def test_each_layout(tmp_path: Path, name: str) -> None:
    data = load_written(tmp_path, name)
    assert (len(data.train), len(data.valid), len(data.test)) == SIZES[name]
    assert sorted(FILES[name]) == sorted(DATA_SETS[name].files)
    assert str(tmp_path) not in data.source


def test_what_the_rows_hold(tmp_path: Path) -> None:
    first = {name: load_written(tmp_path, name).test[0] for name in FILES}
    assert first == {
        "libreoffice_help_de_en": {"source": "ja", "target": "yes", "sentence_id": 0},
        "vader_movie": {"text": "good", "label": 1, "sentence_id": 0},
        "sst2": {"text": "good", "label": 1, "sentence_id": 0},
        "cola": {"text": "good one", "label": 1, "sentence_id": 0},
        "mrpc": {"text": "a", "text_pair": "b", "label": 1, "sentence_id": 0},
        "wnut17": {"tokens": ["A", "Man"], "tags": [0, 9], "sentence_id": 0},
        "xquad": first["xquad"],
        "multi30k": {"source": "de 1", "target": "en 1", "sentence_id": 0},
        "jfleg": {
            "source": "src one .",
            "target": "ref0 one .",
            "references": ["ref0 one .", "ref1 one .", "ref2 one .", "ref3 one ."],
            "sentence_id": 0,
        },
        "brown_gec": {
            "source": "one sentence .",
            "target": "one sentence .",
            "references": ["one sentence ."],
            "sentence_id": 0,
        },
        "brown_jfleg": first["jfleg"],
        "scitldr": {"source": "One. Two.", "target": "Short.", "references": ["Short.", "Shorter."], "sentence_id": 0},
        "debian_synopses": {"source": "Long text.", "target": "short", "references": ["short"], "sentence_id": 0},
        "bea2019": first["conll14"],
        "conll14": {
            "source": "This are fine",
            "target": "This is fine",
            "references": ["This is fine", "This are fine"],
            "sentence_id": 0,
        },
    }
    assert first["xquad"]["answers"] == {"text": ["article"], "answer_start": [0]}


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named_with_layout_and_fix(tmp_path: Path, name: str) -> None:
    last = list(FILES[name])[-1]
    if len(FILES[name]) == 1:
        write(tmp_path, "unrelated.txt", "")
    with pytest.raises(DataError, match=last) as caught:
        load_written(tmp_path, name, **{last: None})
    message = str(caught.value)
    assert f"{tmp_path / last}: no such file" in message
    assert f"Expected layout: {', '.join(DATA_SETS[name].files)}" in message
    assert "Fix: data.root=PATH" in message
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def without(key: str) -> str:
    broken = json.loads(json.dumps(SQUAD))
    del broken["data"][1]["paragraphs"][2]["qas"][0][key]
    return json.dumps(broken)


@pytest.mark.parametrize(
    ("name", "file", "text", "message"),
    [
        (
            "libreoffice_help_de_en",
            "valid.tsv.xz",
            "ja\tyes\nnein\n",
            r"valid\.tsv\.xz:2: 1 columns.*German TAB English",
        ),
        ("vader_movie", "test.tsv.xz", "good\t0\t2.0\n", r"test\.tsv\.xz:1: label 0 contradicts the rating 2\.0"),
        ("sst2", "dev.tsv", "good\t1\nbad\t2\n", r"dev\.tsv:2: label: '2' is not a label"),
        ("cola", "in_domain_dev.tsv", "s\t1\tgood\n", r"in_domain_dev\.tsv:1: 3 columns"),
        ("mrpc", "val.tsv", MRPC[1:].split("\n", 1)[1], r"val\.tsv:1: the header is not Quality TAB"),
        ("wnut17", "dev.conll", "A\tO\nB\n", r"dev\.conll:2: 'B' is not token TAB tag"),
        ("wnut17", "dev.conll", "A\tO\n\nB\tB-planet\n", r"dev\.conll:3: tags: 'B-planet' is not a label"),
        ("xquad", "xquad.en.json", "{", r"xquad\.en\.json: not JSON"),
        ("xquad", "xquad.en.json", "[]", r"xquad\.en\.json: .*not in the SQuAD format"),
        ("xquad", "xquad.en.json", without("answers"), r"qas\[0\]: here or after it not in the SQuAD format"),
        ("xquad", "xquad.en.json", json.dumps({"data": SQUAD["data"][:10]}), r"contexts: 50, expected five for each"),
        ("multi30k", "val.en.gz", "en 1\n", r"val\.de\.gz: not aligned line by line"),
        ("jfleg", "test.ref2", "ref2 one\n\n", r"test\.ref2:2: empty line"),
        ("scitldr", "test.jsonl.gz", '{"source": "One.", "target": ["S"]}\n', r"test\.jsonl\.gz:1: source: not a list"),
        ("scitldr", "test.jsonl.gz", '{"source": ["One."], "target": []}\n', r"test\.jsonl\.gz:1: target: no summary"),
        ("debian_synopses", "test.tsv.xz", "text\n", r"test\.tsv\.xz:1: 1 columns.*description TAB synopsis"),
        ("conll14", "official-2014.combined.m2", "This are\n", r"official-2014\.combined\.m2:1: 'This are' is neither"),
    ],
)
def test_a_broken_line_is_named_with_layout_and_fix(
    tmp_path: Path, name: str, file: str, text: str, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_written(tmp_path, name, **{file: text})
    assert "Expected layout: " in str(caught.value)
    assert "Fix: data.root=PATH" in str(caught.value)


def test_other_training_sets_of_the_shared_task_are_read_where_they_lie_beside(tmp_path: Path) -> None:
    write(tmp_path, "fce.train.gold.bea19.m2", TWICE * 3)
    for name in ("bea2019", "conll14"):
        data = load_written(tmp_path, name)
        assert len(data.train) + len(data.valid) * (name == "bea2019") == 63
        assert list(data.train["target"]).count("This is fine") == 3
