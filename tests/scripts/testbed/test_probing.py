from scripts.testbed.probing import NUM_CONTENT_WORDS, bigram_shift, by_content, by_length, content_words

TEXTS = [f"ein mann {'sehr ' * (n % 5)}sieht wort{n % 30} an" for n in range(300)]


def test_each_probe_labels_what_it_says() -> None:
    texts, labels = by_length(TEXTS, [5.5, 7.5])
    assert texts == TEXTS
    assert all(
        label == (len(text.split()) > 5.5) + (len(text.split()) > 7.5)
        for text, label in zip(texts, labels, strict=True)
    )
    held, numbers = by_content(TEXTS, ["wort3", "wort4", "mann3"])
    assert len(held) == 20
    assert all(f"wort{3 + number}" in text.split() for text, number in zip(held, numbers, strict=True))


def test_bigram_shift_moves_half_of_the_sentences_and_the_same_ones_each_time() -> None:
    texts, labels = bigram_shift([*TEXTS, "wort", ""])
    assert (texts, labels) == bigram_shift([*TEXTS, "wort", ""])
    assert len(texts) == len(TEXTS)
    assert 100 < sum(labels) < 200
    for before, after, label in zip(TEXTS, texts, labels, strict=True):
        assert sorted(before.split()) == sorted(after.split())
        assert label or before == after


def test_content_words_are_neither_the_commonest_nor_rare() -> None:
    texts = [" ".join(f"w{rank}" for rank in range(n % 100)) for n in range(1000)]
    words = content_words(texts)
    assert len(words) == NUM_CONTENT_WORDS
    assert "w0" not in words
    assert "w98" not in words
