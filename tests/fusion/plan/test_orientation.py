import pytest

from fusion import attention, gemm_chain, mlp
from fusion.plan import Chain, Dim, Input, MatMul, Softmax
from fusion.plan.orientation import OrientationError, Roles, columns, roles

DIMS = (Dim("M", 8), Dim("N", 8), Dim("K", 8), Dim("H", 8))


def test_a_value_is_the_left_operand_of_the_next_product_where_that_is_free():
    chain = gemm_chain(M=8, N=8, K=8, H=8)
    assert columns(chain) == {"C": "N", "E": "H"}
    assert roles(chain, "C", columns(chain)) == Roles("A", "B")
    assert roles(chain, "E", columns(chain)) == Roles("C", "D")


def test_a_softmax_runs_along_rows_and_a_gate_lies_as_what_it_multiplies():
    assert columns(attention(M=8, N=8, K=8))["C"] == "N"
    found = columns(mlp(M=8, K=8, N=8, H=8, gated=True))
    assert found["C"] == found["C_up"] == "N"


def test_a_value_that_is_read_from_the_other_side_has_its_other_letter_as_column():
    inputs = (Input("A", "MK"), Input("B", "KN"), Input("D", "HM"), Input("F", "HK"))
    chain = Chain(DIMS, inputs[:3], (MatMul("C", "A", "B", over="K"), MatMul("E", "D", "C", over="M")))
    found = columns(chain)
    assert found == {"C": "M", "E": "H"}
    assert roles(chain, "E", found) == Roles("C", "D")


def test_what_no_layout_suits_is_refused_with_both_reasons():
    inputs = (Input("A", "MK"), Input("B", "KN"), Input("D", "MH"))
    stages = (MatMul("C", "A", "B", over="K"), Softmax("C", "M"), MatMul("E", "C", "D", over="M"), Softmax("E", "N"))
    with pytest.raises(OrientationError, match="cut the chain there"):
        columns(Chain(DIMS, inputs, stages))
