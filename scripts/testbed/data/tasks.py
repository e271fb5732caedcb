"""The task kinds, their canonical columns, and the check that every row passes, wherever it comes from."""

from typing import Any, Literal, get_args

import datasets

Task = Literal[
    "translation", "summarization", "correction", "classification", "regression", "tagging", "question_answering"
]
Row = dict[str, Any]

TASKS: tuple[str, ...] = get_args(Task)


def features_of(task: Task, *, pair: bool, label_names: tuple[str, ...]) -> datasets.Features:
    """The canonical columns of a task, without `sentence_id`.

    Args:
        task: The task kind.
        pair: Whether classification or regression reads two texts.
        label_names: The classes or tags in the order of their numbers; empty for other tasks.

    Returns:
        Column name -> type: `source` and `target` (with all accepted `references` where a task has several), or
        `text`, `text_pair` and `label`, or `tokens` and `tags`, or `id`, `context`, `question` and `answers`.
    """
    text = datasets.Value("string")
    if task == "translation":
        return datasets.Features({"source": text, "target": text})
    if task in ("summarization", "correction"):
        return datasets.Features({"source": text, "target": text, "references": datasets.List(text)})
    if task == "tagging":
        tags = datasets.ClassLabel(names=list(label_names))
        return datasets.Features({"tokens": datasets.List(text), "tags": datasets.List(tags)})
    if task == "question_answering":
        answers = {"text": datasets.List(text), "answer_start": datasets.List(datasets.Value("int32"))}
        return datasets.Features({"id": text, "context": text, "question": text, "answers": answers})
    label = datasets.Value("float64") if task == "regression" else datasets.ClassLabel(names=list(label_names))
    texts = {"text": text, "text_pair": text} if pair else {"text": text}
    return datasets.Features({**texts, "label": label})


def canonical_row(row: Row, task: Task, *, pair: bool, label_names: tuple[str, ...]) -> Row:
    """The row with its labels as numbers, after a check of every value.

    Args:
        row: Exactly the columns of `features_of`; labels and tags as numbers or names.
        task: The task kind.
        pair: Whether classification or regression reads two texts.
        label_names: The classes or tags in the order of their numbers.

    Returns:
        A new row.

    Raises:
        ValueError: A value has the wrong type or range; the message starts with the column's name.
    """
    checked = dict(row)
    for column in ("source", "target", "id", "context", "question", "text", *(["text_pair"] if pair else [])):
        if column in row:
            checked[column] = checked_text(column, row[column])
    if task in ("summarization", "correction"):
        checked["references"] = checked_texts("references", row["references"])
    elif task == "tagging":
        checked["tokens"] = checked_texts("tokens", row["tokens"])
        checked["tags"] = [label_number("tags", tag, label_names) for tag in row["tags"]]
        if len(checked["tokens"]) != len(checked["tags"]):
            raise ValueError(f"tags: {len(checked['tags'])} for {len(checked['tokens'])} tokens; give one a token")
    elif task == "classification":
        checked["label"] = label_number("label", row["label"], label_names)
    elif task == "regression":
        checked["label"] = float(row["label"])
    elif task == "question_answering":
        checked["answers"] = checked_answers(row["answers"], checked["context"])
    return checked


def checked_text(column: str, value: object) -> str:
    """The value, if it is text that UTF-8 can hold."""
    if not isinstance(value, str):
        raise ValueError(f"{column}: {value!r} is not text")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{column}: {value[:40]!r} holds half a surrogate pair")
    return value


def checked_texts(column: str, value: object) -> list[str]:
    """The value, if it is a list of one or more texts."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{column}: {value!r} is not a list of texts")
    return [checked_text(column, item) for item in value]


def label_number(column: str, value: object, label_names: tuple[str, ...]) -> int:
    """The number of a label given by number, by number in text, or by name."""
    if isinstance(value, str) and value in label_names:
        return label_names.index(value)
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if isinstance(number, int) and 0 <= number < len(label_names):
        return int(number)
    numbered = ", ".join(f"{known} {name}" for known, name in enumerate(label_names))
    raise ValueError(f"{column}: {value!r} is not a label; the labels are {numbered} (-1 marks an unlabelled split)")


def checked_answers(answers: object, context: str) -> Row:
    """The answers, if each is found in the context at its start."""
    if not isinstance(answers, dict) or answers.keys() != {"text", "answer_start"}:
        raise ValueError(f"answers: {answers!r} is not {{text: [...], answer_start: [...]}}")
    texts, starts = answers["text"], answers["answer_start"]
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        raise ValueError(f"answers: {answers!r} does not have one answer_start a text")
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(start, int) or start < 0 or not context.startswith(checked_text("answers", text), start):
            raise ValueError(f"answers: {text!r} does not stand at {start!r} in the context")
    return {"text": texts, "answer_start": starts}
