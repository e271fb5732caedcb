"""The sets that come by name from the hub, or from a folder that holds the hub's files."""

from collections.abc import Mapping

from scripts.testbed.data.data_set import GIVEN, HELD_OUT, DataSet, bio
from scripts.testbed.data.hub import PARQUET_COPY, HubSource, Pick
from scripts.testbed.data.tasks import Row

CARD = "see the card on the hub"
THREE = {"train": "train", "valid": "validation", "test": "test"}
LABELLED = {"train": "train", "test": "validation"}
SQUAD_ROW = Pick(tuple((column, column) for column in ("id", "context", "question", "answers")))


def labelled(
    config: str, columns: tuple[str, ...], label_names: tuple[str, ...], *, suite: str, splits: Mapping[str, str]
) -> DataSet:
    """A task of GLUE or SuperGLUE: one or two texts and a class, or a number where there are no names."""
    return DataSet(
        name=config,
        task="classification" if label_names else "regression",
        licence=CARD,
        splits=HELD_OUT,
        hub=HubSource(path=suite, config=config, splits=splits),
        from_hub=Pick((*zip(("text", "text_pair"), columns, strict=False), ("label", "label"))),
        pair=len(columns) == 2,
        label_names=label_names,
    )


def glue(config: str, columns: tuple[str, ...], *label_names: str, validation: str = "validation") -> DataSet:
    """A task of GLUE; its test labels are not public."""
    return labelled(config, columns, label_names, suite="nyu-mll/glue", splits={"train": "train", "test": validation})


def super_glue(config: str, columns: tuple[str, ...], *label_names: str) -> DataSet:
    """A task of SuperGLUE; its test labels are not public."""
    return labelled(config, columns, label_names, suite="aps/super_glue", splits=LABELLED)


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
    super_glue("boolq", ("question", "passage"), "False", "True"),
    super_glue("cb", ("premise", "hypothesis"), "entailment", "contradiction", "neutral"),
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
