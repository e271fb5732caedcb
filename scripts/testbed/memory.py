"""A translation memory: what a translator without a network would paste."""

from collections.abc import Sequence

import numpy as np
import sacrebleu
from sklearn.feature_extraction.text import TfidfVectorizer

NUM_CANDIDATES = 20  # nearest by weighted character n-grams; chrF, which is slow, then ranks these alone


def translate(sources: Sequence[str], memory_sources: Sequence[str], memory_targets: Sequence[str]) -> list[str]:
    """Translate each source by the stored target of the nearest stored source by chrF.

    Args:
        sources: Sentences to translate.
        memory_sources: Stored sentences of the same language.
        memory_targets: Their translations.

    Returns:
        One stored target per source.
    """
    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True, dtype=np.float32)
    stored = vectorizer.fit_transform(memory_sources)
    queries = vectorizer.transform(sources)
    chrf = sacrebleu.CHRF()
    translations = []
    for index, source in enumerate(sources):
        similarity = (stored @ queries[index].T).toarray().ravel()
        count = min(NUM_CANDIDATES, len(similarity))
        nearest = np.argpartition(-similarity, count - 1)[:count]
        best = max(nearest, key=lambda row: chrf.sentence_score(memory_sources[row], [source]).score)
        translations.append(memory_targets[int(best)])
    return translations
