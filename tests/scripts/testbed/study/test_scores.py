from types import SimpleNamespace
from typing import Any

import pytest
import torch
from closeness import assert_equal_up_to_rounding

from scripts.testbed.data import DATA_SETS
from scripts.testbed.data.hub_sets import SUITES
from scripts.testbed.study.scores import answers, entity_f1, normalized, score


def test_entities_count_as_wholes() -> None:
    targets = [["B-person", "I-person", "O"], ["B-group", "O"]]
    assert entity_f1(targets, targets) == {"entity_f1": 1.0}
    assert entity_f1([["B-person", "O", "O"], ["B-group", "O"]], targets) == {"entity_f1": 0.5}


@pytest.mark.parametrize(
    ("predicted", "accepted", "f1", "exact"),
    [
        ("The Eiffel Tower.", ["eiffel tower"], 1.0, 1),
        ("Eiffel", ["the Eiffel Tower", "Paris"], 2 / 3, 0),
        ("", [""], 1.0, 1),
        ("something", [""], 0.0, 0),
        ("a b b", ["b b c"], 0.8, 0),
    ],
)
def test_answers_as_squad_scores_them(predicted: str, accepted: list[str], f1: float, exact: int) -> None:
    assert answers([predicted], [accepted]) == {"answer_f1": f1, "exact_match": exact}


def test_normalized() -> None:
    assert normalized(" An  apple, a pear & THE plum! ") == "apple pear plum"


METRICS = {
    "cola": ["matthews", "accuracy"],
    "sst2": ["accuracy"],
    "mrpc": ["f1", "accuracy"],
    "qqp": ["f1", "accuracy"],
    "stsb": ["spearman", "pearson"],
    **{name: ["accuracy"] for name in ("mnli", "mnli_mismatched", "qnli", "rte", "wnli")},
    **{name: ["accuracy"] for name in ("boolq", "copa", "rte_super", "wic", "wsc")},
    "cb": ["macro_f1", "accuracy"],
    "multirc": ["f1", "accuracy"],
    **{name: ["answer_f1", "exact_match"] for name in ("record", "squad", "squad_v2")},
    "conll2003": ["entity_f1"],
}


@pytest.mark.parametrize("name", METRICS)
def test_every_set_has_its_benchmarks_metrics(name: str) -> None:
    data_set = DATA_SETS[name]
    targets: list[Any] = {
        "classification": [0, 1, 1, 0],
        "regression": [0.0, 1.0, 2.5, 5.0],
        "tagging": [["B-PER", "O"], ["O"]],
        "question_answering": [["a cat"], ["Bonn", "in Bonn"]],
    }[data_set.task]
    right = [target[0] for target in targets] if data_set.task == "question_answering" else targets
    found = score(SimpleNamespace(name=name, task=data_set.task), right, targets)  # type: ignore[arg-type]
    assert list(found) == METRICS[name]
    assert_equal_up_to_rounding(
        "right", torch.tensor(list(found.values())), torch.full((len(found),), 100.0), roundings=4
    )


def test_suites_are_scored() -> None:
    assert {name for suite in SUITES.values() for name in suite} <= set(METRICS)


def test_macro_f1_counts_classes_alike() -> None:
    found = score(SimpleNamespace(name="cb", task="classification"), [0, 0, 0, 0], [0, 0, 0, 1])  # type: ignore[arg-type]
    expected = torch.tensor([100 * (6 / 7) / 2, 75.0])
    assert_equal_up_to_rounding("cb", torch.tensor(list(found.values())), expected, roundings=4)
