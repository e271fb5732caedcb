"""Predictions -> the figures a data set is known by; all in percent."""

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from scripts.testbed.data import Data

Scores = dict[str, float]


def _accuracy(predicted: Sequence[Any], targets: Sequence[Any]) -> Scores:
    return {"accuracy": float(accuracy_score(targets, predicted))}


def _matthews(predicted: Sequence[Any], targets: Sequence[Any]) -> Scores:
    return {"matthews": float(matthews_corrcoef(targets, predicted)), **_accuracy(predicted, targets)}


def _f1(predicted: Sequence[Any], targets: Sequence[Any]) -> Scores:
    return {"f1": float(f1_score(targets, predicted)), **_accuracy(predicted, targets)}


def _macro_f1(predicted: Sequence[Any], targets: Sequence[Any]) -> Scores:
    return {"macro_f1": float(f1_score(targets, predicted, average="macro")), **_accuracy(predicted, targets)}


def _correlations(predicted: Sequence[float], targets: Sequence[float]) -> Scores:
    return {
        "spearman": float(spearmanr(predicted, targets).statistic),
        "pearson": float(pearsonr(predicted, targets).statistic),
    }


def entity_f1(predicted: Sequence[Sequence[str]], targets: Sequence[Sequence[str]]) -> Scores:
    """F1 over whole entities."""
    from seqeval.metrics import f1_score as over_entities  # loads slowly

    return {"entity_f1": float(over_entities([list(tags) for tags in targets], [list(tags) for tags in predicted]))}


def answers(predicted: Sequence[str], targets: Sequence[Sequence[str]]) -> Scores:
    """SQuAD's F1 over words and exact match, each against the best of the accepted answers."""
    count = max(1, len(targets))
    return {
        "answer_f1": sum(max(map(_word_f1(text), accepted)) for text, accepted in zip(predicted, targets, strict=True))
        / count,
        "exact_match": sum(
            normalized(text) in set(map(normalized, accepted))
            for text, accepted in zip(predicted, targets, strict=True)
        )
        / count,
    }


def normalized(text: str) -> str:
    """Lower case, without punctuation and articles, words parted by one blank: as SQuAD's own script compares."""
    kept = "".join(character for character in text.lower() if character not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def _word_f1(predicted: str) -> Callable[[str], float]:
    own = normalized(predicted).split()

    def score(accepted: str) -> float:
        words = normalized(accepted).split()
        if not own or not words:
            return float(own == words)
        common = sum((Counter(own) & Counter(words)).values())
        return 2 * common / (len(own) + len(words))

    return score


BY_SET: Mapping[str, Callable[..., Scores]] = {
    "cola": _matthews,
    "mrpc": _f1,
    "qqp": _f1,
    "cb": _macro_f1,
    "multirc": _f1,  # over all answers; by question alone needs what rows do not keep
}
BY_TASK: Mapping[str, Callable[..., Scores]] = {
    "classification": _accuracy,
    "regression": _correlations,
    "tagging": entity_f1,
    "question_answering": answers,
}


def score(data: Data, predicted: Sequence[Any], targets: Sequence[Any]) -> Scores:
    """The set's metrics in percent, the one it is compared by first.

    Args:
        data: The set.
        predicted: One prediction an example.
        targets: What each should be.
    """
    metric = BY_SET.get(data.name, BY_TASK[data.task])
    return {name: 100.0 * value for name, value in metric(predicted, targets).items()}
