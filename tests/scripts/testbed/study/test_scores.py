import pytest

from scripts.testbed.study.scores import answers, entity_f1, normalized


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
