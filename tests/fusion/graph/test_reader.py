import math

import pytest
import torch
from torch.nn import functional

from fusion.graph.draft import CutError, DraftCausal, DraftProduct, DraftSoftmax
from fusion.graph.reader import read
from fusion.graph.trace import trace
from fusion.graph.uses import Uses
from fusion.plan.stages import Elementwise

INF = math.inf
X, A, B = torch.randn(7, 6), torch.randn(6, 8), torch.randn(8, 6)
Q, K, V = torch.randn(2, 3, 7, 4), torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 6)


def drafted(function, *args, cuts=()):
    graph = trace(function, args, {}).graph_module.graph
    nodes = {node.name: node for node in graph.nodes}
    root = list(graph.nodes)[-1].args[0][0]
    return read(Uses(list(graph.nodes)), {nodes[name] for name in cuts}, root)


def written(draft):
    """Stages in short: products by the nodes of their operands, others by name."""
    short = []
    for stage in draft.stages:
        match stage:
            case DraftProduct(names=names):
                short.append(" @ ".join(draft.inputs[n].node.name if n in draft.inputs else n for n in names))
            case Elementwise(x, operation, operand):
                leaf = draft.inputs.get(operand)
                text = operand if leaf is None else "not " * leaf.inverted + leaf.node.name
                short.append(f"{x} {operation}" + (f" {text}" if operand is not None else ""))
            case DraftCausal(x, row, column, diagonal):
                short.append(f"{x} causal {row[0].size} {column[0].size} {diagonal}")
            case DraftSoftmax(x, over):
                short.append(f"{x} softmax {over[0].size}")
    return short


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x, a, b: torch.relu(x @ a) @ b, ["arg0_1 @ arg1_1", "value0 relu", "value0 @ arg2_1"]),
        (
            lambda x, a, b: x + torch.addmm(x, x @ a, b, alpha=2),
            ["arg0_1 @ arg1_1", "value0 @ arg2_1", "value1 mul 2.0", "value1 add arg0_1", "value1 add arg0_1"],
        ),
        (
            lambda x, a, b: x - (x @ a) @ b * 2 + 1,
            ["arg0_1 @ arg1_1", "value0 @ arg2_1", "value1 mul 2.0", "value1 mul -1.0", "value1 add arg0_1",
             "value1 add 1.0"],
        ),
        (
            lambda x, a, b: (x @ a) @ b - x,
            ["arg0_1 @ arg1_1", "value0 @ arg2_1", "value1 mul -1.0", "value1 add arg0_1", "value1 mul -1.0"],
        ),
        (
            lambda x, a, b: (functional.silu(x @ a) * (x @ a.flip(0))) @ b,
            ["arg0_1 @ flip", "arg0_1 @ arg1_1", "value1 silu", "value1 mul value0", "value1 @ arg2_1"],
        ),
        (lambda x, a, b: x @ (a @ b), ["arg1_1 @ arg2_1", "arg0_1 @ value0"]),
    ],
)  # fmt: skip
def test_stages_come_in_the_order_they_run(function, expected):
    assert written(drafted(function, X, A, B)) == expected


def test_attention_is_products_masks_and_a_softmax():
    mask = torch.rand(2, 1, 1, 5) > 0.5
    attend = functional.scaled_dot_product_attention
    draft = drafted(lambda q, k, v, m: attend(q, k, v, torch.logical_and(m, m)), Q, K, V, mask)
    assert written(draft) == [
        "arg0_1 @ arg1_1", "value0 mul 0.5", "value0 mask logical_and", "value0 softmax 5", "value0 @ arg2_1",
    ]  # fmt: skip
    draft = drafted(lambda q, k, v: attend(q, k, v, torch.zeros(7, 5), scale=2.0), Q, K, V)
    assert written(draft) == ["arg0_1 @ arg1_1", "value0 mul 2.0", "value0 softmax 5", "value0 @ arg2_1"]
    draft = drafted(lambda q, k, v: attend(q, k, v, is_causal=True), Q, K, V)
    assert written(draft)[2] == "value0 causal 7 5 0"


@pytest.mark.parametrize(
    ("masked", "expected"),
    [
        (lambda s, m: s.masked_fill(m, -INF), "value0 mask not arg3_1"),
        (lambda s, m: s.masked_fill(~m, -INF), "value0 mask arg3_1"),
        (lambda s, m: s.masked_fill(torch.logical_not(~m), -INF), "value0 mask not arg3_1"),
        (lambda s, m: torch.where(m.expand(2, 3, 7, 5), s, -INF), "value0 mask arg3_1"),
        (lambda s, m: s.masked_fill(torch.ones(7, 5, dtype=torch.bool).triu(2), -INF), "value0 causal 7 5 1"),
        (lambda s, m: s.masked_fill(torch.ones(7, 5, dtype=torch.bool).tril(-1), -INF), "value0 causal 5 7 0"),
        (lambda s, m: s + torch.full((7, 5), -INF).triu(1), "value0 causal 7 5 0"),
        (lambda s, m: s + torch.zeros(7, 5).masked_fill(torch.eye(7, 5) == 0, -INF), "value0 add masked_fill"),
        (lambda s, m: s.masked_fill(torch.zeros(7, 5, dtype=torch.bool), -INF), "value0 softmax 5"),
    ],
)
def test_masks(masked, expected):
    mask = torch.rand(2, 1, 7, 5) > 0.5
    assert expected in written(drafted(lambda q, k, v, m: masked(q @ k.mT, m).softmax(-1) @ v, Q, K, V, mask))


def test_casts_within_a_chain_are_its_own_arithmetic():
    def function(x, a, b):
        return torch.softmax((x @ a).float(), dim=-1).to(x.dtype) @ b

    draft = drafted(function, X.bfloat16(), A.bfloat16(), B.bfloat16())
    assert written(draft) == ["arg0_1 @ arg1_1", "value0 softmax 8", "value0 @ arg2_1"]


def test_an_input_is_read_behind_its_views_but_not_behind_a_cast():
    def function(x, a, b):
        return (x.T.contiguous().T @ a.double().float()) @ b[None].expand(1, 8, 6)[0].half().float()

    assert [leaf.node.name for leaf in drafted(function, X, A, B).inputs.values()] == ["arg0_1", "to_1", "to_3"]


def test_nodes_that_are_cut_off_are_inputs():
    function = lambda x, a, b: torch.relu(x @ a) @ b  # noqa: E731
    assert written(drafted(function, X, A, B, cuts=["relu"])) == ["relu @ arg2_1"]
    with pytest.raises(CutError) as error:
        drafted(function, X, A, B, cuts=["matmul"])
    assert (error.value.node.name, error.value.reason) == ("relu", "")


@pytest.mark.parametrize(
    ("function", "node", "reason"),
    [
        (lambda x, a, b: x.double() @ a.double(), "matmul", "dtype torch.float64: accepted are"),
        (lambda x, a, b: (x.half() @ a.half()).float() @ b, "to_2", "mixes dimensions or casts, so matmul must be"),
        (lambda x, a, b: (x @ a).half() @ b.half(), "matmul", "its product is in torch.float32"),
        (lambda x, a, b: (x @ a * a.double()[:1]).float() @ b, "to_1", "mixes dimensions or casts, so mul must be"),
        (lambda x, a, b: (x @ a).mul(a.half()[0]) @ b, "mul", "is torch.float16, not torch.float32: cast it first"),
        (lambda x, a, b: ((x @ a)[None] + torch.rand(3, 7, 8)) @ b, "add", "makes its product larger: expand"),
        (lambda x, a, b: (x @ a).reshape(8, 7) @ x, "reshape", "mixes dimensions or casts, so matmul must be"),
        (lambda x, a, b: ((h := x @ a) + torch.relu(h)) @ b, "matmul", "read before and after a stage"),
        (lambda x, a, b: (h := x @ a) @ (b * h.sum()), "matmul", r"is read by sum_1 \(aten.sum.default\)"),
    ],
)
def test_what_cannot_stay_on_chip_is_cut_off(function, node, reason):
    with pytest.raises(CutError, match=reason) as error:
        drafted(function, X, A, B)
    assert error.value.node.name == node


def test_nothing_is_computed_of_nothing():
    with pytest.raises(CutError, match="is empty: nothing to compute"):
        drafted(lambda x, a: x @ a, X[:0], A)
    with pytest.raises(CutError, match=r"integer matmul, torch.int64"):
        drafted(lambda x, a: x @ a, X.long(), A.long())
