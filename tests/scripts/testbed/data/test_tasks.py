from typing import Any

import pytest

from scripts.testbed.data.tasks import TASKS, Row, Task, canonical_row, features_of

NAMES = ("no", "yes")
ANSWERS = {"text": ["cat"], "answer_start": [4]}
GOOD: dict[Task, Row] = {
    "translation": {"source": "a", "target": "b"},
    "summarization": {"source": "a", "target": "b", "references": ["b", "c"]},
    "correction": {"source": "a", "target": "b", "references": ["b"]},
    "classification": {"text": "a", "label": 1},
    "regression": {"text": "a", "label": 2.5},
    "tagging": {"tokens": ["a", "b"], "tags": [0, 1]},
    "question_answering": {"id": "1", "context": "the cat", "question": "who?", "answers": ANSWERS},
}


def checked(task: Task, **changes: Any) -> Row:
    return canonical_row({**GOOD[task], **changes}, task, pair="text_pair" in changes, label_names=NAMES)


@pytest.mark.parametrize("task", TASKS)
def test_a_good_row_stays_and_has_the_canonical_columns(task: Task) -> None:
    assert checked(task) == GOOD[task]
    assert list(features_of(task, pair=False, label_names=NAMES)) == list(GOOD[task])


def test_labels_come_as_numbers_digits_or_names() -> None:
    assert [checked("classification", label=label)["label"] for label in (0, "1", "yes", True)] == [0, 1, 1, 1]
    assert checked("tagging", tags=["yes", "no"])["tags"] == [1, 0]
    assert checked("regression", label="3.5")["label"] == 3.5


def test_pairs_have_a_second_text() -> None:
    assert checked("classification", text_pair="b")["text_pair"] == "b"
    assert list(features_of("classification", pair=True, label_names=NAMES)) == ["text", "text_pair", "label"]


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("translation", {"source": None}, "source: None"),
        ("translation", {"target": 3}, "target: 3"),
        ("translation", {"source": "a\ud800"}, "source: .*surrogate"),
        ("correction", {"references": []}, "references"),
        ("summarization", {"references": "b"}, "references"),
        ("summarization", {"references": ["b", None]}, "references"),
        ("classification", {"label": -1}, "label: -1 .*unlabelled"),
        ("classification", {"label": 2}, "label: 2"),
        ("classification", {"label": "perhaps"}, "label: 'perhaps' .*0 no, 1 yes"),
        ("classification", {"label": 1.0}, "label: 1.0"),
        ("classification", {"text_pair": None}, "text_pair"),
        ("regression", {"label": "high"}, "could not convert"),
        ("tagging", {"tags": [0]}, "tags: 1 for 2 tokens"),
        ("tagging", {"tags": [0, 7]}, "tags: 7"),
        ("tagging", {"tokens": []}, "tokens"),
        ("question_answering", {"answers": {"text": ["cat"]}}, "answers"),
        ("question_answering", {"answers": {"text": ["cat"], "answer_start": [4, 5]}}, "answers"),
        ("question_answering", {"answers": {"text": ["cat"], "answer_start": [3]}}, "'cat' does not stand at 3"),
        ("question_answering", {"answers": {"text": ["cat"], "answer_start": [-3]}}, "does not stand at -3"),
    ],
)
def test_a_bad_value_is_named(task: Task, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked(task, **changes)


def test_a_question_may_have_no_answer() -> None:
    none = {"text": [], "answer_start": []}
    assert checked("question_answering", answers=none)["answers"] == none
