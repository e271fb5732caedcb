"""Rows of a data set as token ids and targets: a class or number a text, a class a word, or a span of the context.

S: tokens of a text
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from configs.typed import ConfigError
from scripts.testbed.data import Data
from scripts.testbed.tasks.task import IGNORED

KINDS = ("classification", "regression", "tagging", "question_answering")


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One example."""

    inputs: dict[str, list[int]]
    """What the encoder reads: input_ids, and token_type_ids where the tokenizer gives them; each of S."""
    target: Any
    """A class, a number, S classes (IGNORED where no word begins), or (first, last) token of the answer."""
    answer: Any = None
    """What a prediction is scored against, where that is not the target: the words' tags, or the answers' texts."""
    spans: Sequence[tuple[int, int]] = ()
    """For an answer to be read off: where each token lies in the context, (0, 0) outside it."""
    context: str = ""
    """The text that answers are read off."""


def encode(data: Data, rows: Any, tokenizer: PreTrainedTokenizerFast, *, max_length: int) -> list[Encoded]:
    """Every row as an example, truncated to the length the network reads.

    Args:
        data: Says the kind of task.
        rows: One of its splits.
        tokenizer: The encoder's.
        max_length: Longest text in tokens; of a question and its context, the context is cut.

    Raises:
        ConfigError: The task is of no kind that is studied.
    """
    if data.task not in KINDS:
        raise ConfigError(f"study.tasks: got {data.name}, which is {data.task}; accepts sets of {', '.join(KINDS)}")
    if data.task == "tagging":
        return _tagging(data, rows, tokenizer, max_length)
    if data.task == "question_answering":
        return _question_answering(rows, tokenizer, max_length)
    pairs = [list(rows["text_pair"])] if "text_pair" in rows.column_names else []
    encoded = tokenizer(list(rows["text"]), *pairs, truncation=True, max_length=max_length)
    return [Encoded(inputs=_inputs(encoded, index), target=label) for index, label in enumerate(list(rows["label"]))]


def _inputs(encoded: Any, index: int) -> dict[str, list[int]]:
    names = ("input_ids", "token_type_ids")
    return {name: list(encoded[name][index]) for name in names if name in encoded}


def _tagging(data: Data, rows: Any, tokenizer: PreTrainedTokenizerFast, max_length: int) -> list[Encoded]:
    """The first token of every word carries its tag; words that were cut off are predicted as outside."""
    words, tags = list(rows["tokens"]), list(rows["tags"])
    encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=max_length)
    examples = []
    for index, own in enumerate(tags):
        word_ids = encoded.word_ids(index)
        target = [
            IGNORED if word is None or (position and word_ids[position - 1] == word) else own[word]
            for position, word in enumerate(word_ids)
        ]
        names = [data.label_names[tag] for tag in own]
        examples.append(Encoded(inputs=_inputs(encoded, index), target=target, answer=names))
    return examples


def _question_answering(rows: Any, tokenizer: PreTrainedTokenizerFast, max_length: int) -> list[Encoded]:
    """Token 0 is the answer to what has none, or whose answer was cut off."""
    questions, contexts, answers = list(rows["question"]), list(rows["context"]), list(rows["answers"])
    encoded = tokenizer(
        questions, contexts, truncation="only_second", max_length=max_length, return_offsets_mapping=True
    )
    examples = []
    for index, answer in enumerate(answers):
        spans = [
            span if part == 1 else (0, 0)
            for span, part in zip(encoded["offset_mapping"][index], encoded.sequence_ids(index), strict=True)
        ]
        target = (0, 0)
        if answer["text"]:
            start = answer["answer_start"][0]
            target = _covering(spans, start, start + len(answer["text"][0]))
        texts = list(answer["text"]) or [""]
        inputs = _inputs(encoded, index)
        examples.append(Encoded(inputs=inputs, target=target, answer=texts, spans=spans, context=contexts[index]))
    return examples


def _covering(spans: Sequence[tuple[int, int]], start: int, stop: int) -> tuple[int, int]:
    tokens = [position for position, (low, high) in enumerate(spans) if low < high and low < stop and high > start]
    whole = bool(tokens) and spans[tokens[0]][0] <= start and spans[tokens[-1]][1] >= stop
    return (tokens[0], tokens[-1]) if whole else (0, 0)
