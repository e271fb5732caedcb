"""What frozen, mean-pooled encoder states tell of a sentence: three probes that need no annotation.

Length, word content and bigram shift are those of SentEval's probing sets that can be made from any sentences; the
other seven need parses. Bigram shift favours any objective that looks at order: it is reported and not led with.
"""

import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from configs.schema import Config
from scripts.testbed.quartet import QuartetModel
from scripts.testbed.robustness import pooled_states
from scripts.testbed.rows import Row
from scripts.testbed.tasks.translation import Translation

NUM_TRAINING = 5000
NUM_LENGTH_CLASSES = 6
NUM_CONTENT_WORDS = 20
COMMON_WORDS = 60  # the most frequent are function words, whose presence says nothing

Examples = tuple[list[str], list[int]]


def rows(config: Config, task: Translation, model: QuartetModel) -> tuple[Row, ...]:
    """Accuracy of a linear classifier on each probe's test sources, and of always answering the commonest class."""
    train, test = list(task.data.train["source"])[:NUM_TRAINING], list(task.data.test["source"])
    bounds = np.quantile([len(text.split()) for text in train], np.arange(1, NUM_LENGTH_CLASSES) / NUM_LENGTH_CLASSES)
    words = content_words(train)
    found = []
    for name, make in (
        ("length", lambda texts: by_length(texts, bounds)),
        ("content", lambda texts: by_content(texts, words)),
        ("bigram_shift", bigram_shift),
    ):
        (seen, labels), (unseen, truth) = make(train), make(test)
        if len(set(labels)) < 2 or not truth:
            continue
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
        classifier.fit(pooled_states(model, task, seen).numpy(), labels)
        right = 100 * float((classifier.predict(pooled_states(model, task, unseen).numpy()) == np.array(truth)).mean())
        common = 100 * truth.count(Counter(labels).most_common(1)[0][0]) / len(truth)
        method = config.comparison.method
        found.append(Row(provider=method, metric=f"probe_{name}", unit="percent", value=right))
        found.append(Row(provider=method, metric=f"probe_{name}_commonest", unit="percent", value=common))
    return tuple(found)


def by_length(texts: Sequence[str], bounds: Sequence[float] | np.ndarray) -> Examples:
    """Every text with the number of its class of lengths."""
    return list(texts), [int(np.searchsorted(bounds, len(text.split()))) for text in texts]


def content_words(texts: Sequence[str]) -> list[str]:
    """Words of middling frequency, each in many texts and in few."""
    counts = Counter(word for text in texts for word in set(text.split()))
    return [word for word, _ in counts.most_common(COMMON_WORDS + NUM_CONTENT_WORDS)[COMMON_WORDS:]]


def by_content(texts: Sequence[str], words: Sequence[str]) -> Examples:
    """The texts that hold exactly one of some words, with its number."""
    held = [[number for number, word in enumerate(words) if word in text.split()] for text in texts]
    return [text for text, own in zip(texts, held, strict=True) if len(own) == 1], [
        own[0] for own in held if len(own) == 1
    ]


def bigram_shift(texts: Sequence[str]) -> Examples:
    """Every text of two words or more; in half of them two neighbours have changed places, which is class 1."""
    draw = random.Random(0)  # noqa: S311 -- the same sentences for every network
    shifted, labels = [], []
    for text in texts:
        words = text.split()
        if len(words) < 2:
            continue
        label = draw.randrange(2)
        if label:
            at = draw.randrange(len(words) - 1)
            words[at], words[at + 1] = words[at + 1], words[at]
        shifted.append(" ".join(words))
        labels.append(label)
    return shifted, labels
