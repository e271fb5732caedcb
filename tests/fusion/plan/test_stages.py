import pytest

from fusion.plan import Causal, Elementwise, MatMul, Softmax
from fusion.plan.stages import operands, product_dims


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (MatMul("C", "A", "B", over="K"), ("A", "B")),
        (Elementwise("C", "add", "bias"), ("bias",)),
        (Elementwise("C", "mul", 0.5), ()),
        (Elementwise("C", "relu"), ()),
        (Causal("C", row="M", column="N"), ()),
        (Softmax("C", over="N"), ()),
    ],
)
def test_operands_are_what_a_stage_only_reads(stage, expected):
    assert operands(stage) == expected


def test_a_product_keeps_every_other_letter_in_the_chains_order():
    product = MatMul("C", "A", "B", over="K")
    assert product_dims(product, {"A": "KMZ", "B": "RNK"}, "ZRMNK") == "ZRMN"
    assert product_dims(product, {"A": "KMZ", "B": "RNK"}, "KNMRZ") == "NMRZ"


def test_stages_are_frozen_and_hashable():
    stage = Softmax("C", over="N")
    with pytest.raises(AttributeError):
        stage.over = "M"
    assert len({stage, Softmax("C", over="N"), Softmax("C", over="M")}) == 2
