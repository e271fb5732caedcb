import pytest
import torch

from fusion.graph.draft import CutError, Draft, DraftCausal, DraftSoftmax, Leaf
from fusion.graph.trace import trace
from fusion.plan.stages import Elementwise


@pytest.fixture
def nodes():
    def function(x, a, b):
        return (x @ a).relu() * (x @ b)

    args = [torch.randn(7, 6), torch.randn(6, 8), torch.randn(6, 8)]
    return {node.name: node for node in trace(function, args, {}).graph_module.graph.nodes}


def gated(nodes):
    """The draft of a gated pair: both products read x along the same rows."""
    draft = Draft(nodes["mul"])
    rows, columns = draft.layout
    for number, weight in ((1, "arg1_1"), (2, "arg2_1")):
        over = (draft.axes.new(6),)
        names = (
            draft.add_input(Leaf(nodes["arg0_1"], (rows, over))),
            draft.add_input(Leaf(nodes[weight], (over, columns))),
        )
        node = nodes["matmul" if number == 1 else "matmul_1"]
        value = draft.multiply(names, (nodes["arg0_1"], nodes[weight]), over, node)
        draft.remember(node, draft.layout, value)
    return draft


def test_products_and_stages_come_in_order(nodes):
    draft = gated(nodes)
    first, second = (product.out for product in draft.products)
    draft.change(Elementwise(first, "relu"))
    draft.change(DraftSoftmax(second, draft.layout[1]))
    draft.change(Elementwise(second, "mul", first))
    assert [type(stage).__name__ for stage in draft.stages] == [
        "DraftProduct", "DraftProduct", "Elementwise", "DraftSoftmax", "Elementwise",
    ]  # fmt: skip
    assert draft.output == second
    assert draft.node_of(first) is nodes["matmul"]
    assert list(draft.covered) == [nodes["matmul"], nodes["matmul_1"]]


def test_sums_over_the_same_input_are_shared(nodes):
    draft = gated(nodes)
    assert len(draft.inputs) == 4
    draft.share_sums()
    first, second = draft.products
    assert len(draft.inputs) == 3
    assert first.names[0] == second.names[0]
    assert draft.axes.atoms(first.over) == draft.axes.atoms(second.over)
    weights = [draft.inputs[product.names[1]].layout for product in (first, second)]
    assert draft.axes.same(*weights)


def test_sums_behind_values_are_not_shared(nodes):
    draft = gated(nodes)
    first = draft.products[0]
    over = (draft.axes.new(6),)
    x = draft.add_input(Leaf(nodes["arg0_1"], ((draft.axes.new(7),), over)))
    draft.multiply((first.out, x), (nodes["matmul"], nodes["arg0_1"]), over, nodes["mul"])
    draft.share_sums()
    assert draft.axes.atoms(over) != draft.axes.atoms(first.over)


def test_a_value_that_was_read_does_not_change(nodes):
    draft = gated(nodes)
    first, second = (product.out for product in draft.products)
    draft.change(Elementwise(second, "mul", first))
    for stage in (Elementwise(first, "relu"), DraftCausal(first, *draft.layout, 0), Elementwise(first, "add", first)):
        with pytest.raises(CutError, match="matmul is read by 1 operations, so it must be written out"):
            draft.change(stage)


def test_what_was_read_is_recalled_as_long_as_it_is_the_same(nodes):
    draft = gated(nodes)
    first = draft.products[0].out
    assert draft.recall(nodes["matmul"], draft.layout) == first
    assert draft.recall(nodes["relu"], draft.layout) is None
    with pytest.raises(CutError, match="matmul is read along other dimensions too"):
        draft.recall(nodes["matmul"], draft.layout[::-1])
    draft.change(Elementwise(first, "relu"))
    draft.remember(nodes["relu"], draft.layout, first)
    assert draft.recall(nodes["relu"], draft.layout) == first
    with pytest.raises(CutError, match="matmul is read before and after a stage") as error:
        draft.recall(nodes["matmul"], draft.layout)
    assert error.value.node is nodes["matmul"]
