"""The statement graph: the paper's Figure 5(a), and what stages between products add to it."""

from fusion.plan import Chain, Dim, Elementwise, Input, MatMul, attention, gemm_chain, mlp
from fusion.plan.statements import (
    Statement,
    dependence_graph,
    epilogue_operands,
    pending_sums,
    product_of,
    ready,
)


def written(chain):
    return [
        f"{node.statement}[{node.scope}] after {' '.join(map(str, node.after))}".removesuffix(" after ")
        for node in dependence_graph(chain)
    ]


def test_the_graph_of_figure_5():
    assert written(gemm_chain(M=1, N=1, K=1, H=1)) == [
        "L_A[MK]", "L_B[NK]", "C_C[MNK] after L_A L_B", "L_D[NH]", "C_E[MNH] after C_C L_D", "S_E[MH] after C_E",
    ]  # fmt: skip


def test_stages_finish_a_value_before_it_is_read():
    assert written(attention(M=1, N=1, K=1, batch=2, mask="MN", keep="ZN")) == [
        "L_A[MK]", "L_B[NK]", "C_C[MNK] after L_A L_B",
        "L_mask[MN]", "L_keep[N]", "F_C[MN] after C_C L_mask L_keep",
        "L_D[NH]", "C_E[MNH] after F_C L_D", "S_E[MH] after C_E",
    ]  # fmt: skip


def test_a_gate_is_computed_before_the_finish_that_reads_it():
    assert written(mlp(M=1, K=1, N=1, gated=True, residual=True)) == [
        "L_A[MK]", "L_B_up[NK]", "C_C_up[MNK] after L_A L_B_up", "L_B[NK]", "C_C[MNK] after L_A L_B",
        "F_C[MN] after C_C C_C_up", "L_D[NH]", "C_E[MNH] after F_C L_D", "L_residual[MH]",
        "F_E[MH] after C_E L_residual", "S_E[MH] after F_E",
    ]  # fmt: skip


def test_what_is_read_when():
    chain = mlp(M=1, K=1, N=1, gated=True, bias=True)
    assert epilogue_operands(chain, "C") == ("bias_C", "C_up")
    assert [str(ready(chain, name)) for name in ("A", "C_up", "C", "E")] == ["L_A", "F_C_up", "F_C", "F_E"]
    assert str(ready(gemm_chain(M=1, N=1, K=1), "C")) == "C_C"
    assert product_of(chain, "E") == MatMul("E", "C", "D", over="N")


def test_an_operand_read_twice_is_named_once():
    chain = gemm_chain(M=1, N=1, K=1, H=1)
    stages = (chain.stages[0], Elementwise("C", "add", "b"), Elementwise("C", "mul", "b"), chain.stages[1])
    chain = Chain(chain.dims, (*chain.inputs, Input("b", "N")), stages)
    assert epilogue_operands(chain, "C") == ("b",)
    assert [node.statement for node in dependence_graph(chain)].count(Statement("L", "b")) == 1


def test_sums_that_must_be_over():
    chain = gemm_chain(M=1, N=1, K=1, H=1, P=1)
    assert [pending_sums(chain, value) for value in ("C", "E", "G")] == ["", "K", "NK"]


def test_a_sum_that_the_own_product_has_too_is_not_pending():
    chain = Chain(
        tuple(Dim(letter, 1) for letter in "MNKP"),
        (Input("A", "MK"), Input("B", "KN"), Input("F", "MP"), Input("I", "PN")),
        (MatMul("U", "F", "I", over="P"), MatMul("C", "A", "B", over="K"), Elementwise("C", "mul", "U")),
    )
    assert pending_sums(chain, "C") == "P"
    assert pending_sums(mlp(M=1, K=1, N=1, gated=True), "C") == ""
