"""The sets that come by name from the hub, or from a folder that holds the hub's files."""

from collections.abc import Callable, Mapping
from functools import partial

from scripts.testbed.data.data_set import GIVEN, HELD_OUT, DataSet, bio
from scripts.testbed.data.hub import PARQUET_COPY, HubSource, Pick
from scripts.testbed.data.tasks import Row

CARD = "see the card on the hub"
THREE = {"train": "train", "valid": "validation", "test": "test"}
LABELLED = {"train": "train", "test": "validation"}
SQUAD_ROW = Pick(tuple((column, column) for column in ("id", "context", "question", "answers")))


def labelled(
    config: str,
    columns: tuple[str, ...],
    label_names: tuple[str, ...],
    *,
    suite: str,
    splits: Mapping[str, str],
    name: str | None = None,
    row: Callable[[Row], Row] | None = None,
) -> DataSet:
    """A task of GLUE or SuperGLUE: one or two texts and a class, or a number where there are no names.

    Args:
        config: Its configuration on the hub.
        columns: The hub's columns that hold the texts.
        label_names: Classes in the order of their numbers.
        suite: The hub's data set.
        splits: Our split -> the hub's.
        name: Ours, where it is not the configuration's.
        row: Makes the texts of a row, where they are no columns.
    """
    return DataSet(
        name=name or config,
        task="classification" if label_names else "regression",
        licence=CARD,
        splits=HELD_OUT,
        hub=HubSource(path=suite, config=config, splits=splits),
        from_hub=row or Pick((*zip(("text", "text_pair"), columns, strict=False), ("label", "label"))),
        pair=len(columns) == 2,
        label_names=label_names,
    )


def glue(
    config: str,
    columns: tuple[str, ...],
    *label_names: str,
    validation: str = "validation",
    name: str | None = None,
) -> DataSet:
    """A task of GLUE; its test labels are not public."""
    splits = {"train": "train", "test": validation}
    return labelled(config, columns, label_names, suite="nyu-mll/glue", splits=splits, name=name)


def super_glue(
    config: str,
    columns: tuple[str, ...],
    *label_names: str,
    name: str | None = None,
    row: Callable[[Row], Row] | None = None,
) -> DataSet:
    """A task of SuperGLUE; its test labels are not public."""
    return labelled(config, columns, label_names, suite="aps/super_glue", splits=LABELLED, name=name, row=row)


def two_texts(row: Row, text: str, text_pair: str) -> Row:
    """The canonical row of two texts with the hub's columns in braces, as in `{word}: {sentence1}`."""
    columns = {column: value for column, value in row.items() if isinstance(value, str)}
    try:
        made = {"text": text.format_map(columns), "text_pair": text_pair.format_map(columns)}
    except KeyError as error:
        raise ValueError(f"{error.args[0]}: no such column of text; the columns are {', '.join(row)}") from error
    return {**made, **Pick((("label", "label"),))(row)}


COPA_QUESTIONS = {"cause": "What was the cause?", "effect": "What was the effect?"}


def copa_row(row: Row) -> Row:
    """A premise with its question, and both choices as one text; the class is the number of the right one."""
    question = COPA_QUESTIONS.get(str(row.get("question")))
    if question is None:
        raise ValueError(f"question: {row.get('question')!r} is neither {' nor '.join(COPA_QUESTIONS)}")
    return two_texts({**row, "question": question}, "{premise} {question}", "{choice1} Or: {choice2}")


def record_row(row: Row) -> Row:
    """ReCoRD as answers to be found in the passage, where each stands first; one that stands nowhere is left out."""
    picked = Pick((("context", "passage"), ("question", "query"), ("answers", "answers")))(row)
    starts = {text: picked["context"].find(text) for text in dict.fromkeys(picked["answers"])}
    found = {text: start for text, start in starts.items() if start >= 0}
    number = row["idx"].get("query", "") if isinstance(row.get("idx"), Mapping) else ""
    answers = {"text": list(found), "answer_start": list(found.values())}
    return {**picked, "id": str(number), "answers": answers}


def translation(name: str, source: str, target: str, hub: HubSource) -> DataSet:
    """Translated pairs; the hub keeps them as one record a pair, from language code to text."""
    columns = (("source", f"translation.{source}"), ("target", f"translation.{target}"))
    return DataSet(name=name, task="translation", licence=CARD, hub=hub, from_hub=Pick(columns))


def squad(name: str) -> DataSet:
    """SQuAD in either version; its test answers are not public."""
    return DataSet(
        name=name,
        task="question_answering",
        licence="CC BY-SA 4.0",
        splits=HELD_OUT,
        hub=HubSource(path=f"rajpurkar/{name}", splits=LABELLED),
        from_hub=SQUAD_ROW,
    )


def cnn_dailymail_row(row: Row) -> Row:
    """An article and its highlights, the only reference."""
    picked = Pick((("source", "article"), ("target", "highlights")))(row)
    return {**picked, "references": [picked["target"]]}


HUB_SETS = (
    glue("qnli", ("question", "sentence"), "entailment", "not_entailment"),
    glue("rte", ("sentence1", "sentence2"), "entailment", "not_entailment"),
    glue("wnli", ("sentence1", "sentence2"), "not_entailment", "entailment"),
    glue("qqp", ("question1", "question2"), "not_duplicate", "duplicate"),
    glue("stsb", ("sentence1", "sentence2")),
    glue(
        "mnli",
        ("premise", "hypothesis"),
        *("entailment", "neutral", "contradiction"),
        validation="validation_matched",
    ),
    glue(
        "mnli",
        ("premise", "hypothesis"),
        *("entailment", "neutral", "contradiction"),
        validation="validation_mismatched",
        name="mnli_mismatched",
    ),
    super_glue("boolq", ("question", "passage"), "False", "True"),
    super_glue("cb", ("premise", "hypothesis"), "entailment", "contradiction", "neutral"),
    super_glue("copa", ("premise", "choices"), "choice1", "choice2", row=copa_row),
    super_glue(
        "multirc",
        ("paragraph", "question and answer"),
        *("False", "True"),
        row=partial(two_texts, text="{paragraph}", text_pair="{question} {answer}"),
    ),
    super_glue("rte", ("premise", "hypothesis"), "entailment", "not_entailment", name="rte_super"),
    super_glue(
        "wic",
        ("word and sentence1", "sentence2"),
        *("False", "True"),
        row=partial(two_texts, text="{word}: {sentence1}", text_pair="{sentence2}"),
    ),
    super_glue(
        "wsc.fixed",
        ("text", "span2 refers to span1"),
        *("False", "True"),
        name="wsc",
        row=partial(two_texts, text="{text}", text_pair="{span2_text} refers to {span1_text}."),
    ),
    DataSet(
        name="record",
        task="question_answering",
        licence=CARD,
        splits=HELD_OUT,
        hub=HubSource(path="aps/super_glue", config="record", splits=LABELLED),
        from_hub=record_row,
    ),
    squad("squad"),
    squad("squad_v2"),
    DataSet(
        name="conll2003",
        task="tagging",
        licence="research use",
        splits=GIVEN,
        hub=HubSource(path="eriktks/conll2003", revision=PARQUET_COPY, splits=THREE),
        from_hub=Pick((("tokens", "tokens"), ("tags", "ner_tags"))),
        label_names=bio("PER", "ORG", "LOC", "MISC"),
    ),
    translation(
        "iwslt14_de_en", "de", "en", HubSource(path="bbaaaa/iwslt14-de-en", revision=PARQUET_COPY, splits=THREE)
    ),
    translation("wmt14_en_de", "en", "de", HubSource(path="wmt/wmt14", config="de-en", splits=THREE)),
    translation("wmt16_ro_en", "ro", "en", HubSource(path="wmt/wmt16", config="ro-en", splits=THREE)),
    DataSet(
        name="cnn_dailymail",
        task="summarization",
        licence="Apache-2.0",
        hub=HubSource(path="abisee/cnn_dailymail", config="3.0.0", splits=THREE),
        from_hub=cnn_dailymail_row,
    ),
)

SUITES: Mapping[str, tuple[str, ...]] = {
    "glue": ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "mnli_mismatched", "qnli", "rte", "wnli"),
    "super_glue": ("boolq", "cb", "copa", "multirc", "record", "rte_super", "wic", "wsc"),
}
"""Sets that are asked for together by one name."""
