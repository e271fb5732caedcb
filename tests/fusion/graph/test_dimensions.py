import pytest
import torch
from torch.nn import functional

from fusion.graph.dimensions import dimensions, tensors
from fusion.graph.draft import CutError
from fusion.graph.reader import read
from fusion.graph.trace import trace
from fusion.graph.uses import Uses


def drafted(function, *args):
    graph = trace(function, args, {}).graph_module.graph
    return read(Uses(list(graph.nodes)), set(), list(graph.nodes)[-1].args[0][0])


def sizes(function, *args):
    """Sizes of the axes of each dimension."""
    return [[axis.size for axis in group] for group in dimensions(tensors(drafted(function, *args)))]


def attend(q, k, v, mask=None):
    return functional.scaled_dot_product_attention(q, k, v, mask)


def mlp(x, a, b):
    return torch.relu(x @ a) @ b


Q, K, V = torch.randn(2, 3, 7, 4), torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 6)
A, B = torch.randn(4, 8), torch.randn(8, 9)


def test_axes_that_all_tensors_have_side_by_side_are_one_dimension():
    assert sizes(attend, Q, K, V) == [[2, 3], [7], [4], [5], [6]]
    assert sizes(mlp, Q, A, B) == [[2, 3, 7], [4], [8], [9]]


def test_strides_keep_axes_apart():
    moved = torch.randn(2, 7, 3, 4).transpose(1, 2)
    assert sizes(attend, moved, K, V) == [[2], [3], [7], [4], [5], [6]]
    assert sizes(mlp, moved, A, B) == [[2], [3], [7], [4], [8], [9]]
    assert sizes(mlp, Q[:, :, :6], A, B) == [[2, 3], [6], [4], [8], [9]]


def test_a_tensor_that_has_one_of_them_keeps_axes_apart():
    assert sizes(attend, Q, K, V, torch.randn(2, 1, 1, 5))[:2] == [[2], [3]]
    assert sizes(attend, Q, K, V, torch.randn(3, 7, 5))[:2] == [[2], [3]]


def test_the_order_of_the_result_keeps_axes_apart():
    assert sizes(lambda x, a, b: mlp(x, a, b).transpose(0, 1).contiguous(), Q, A, B)[:3] == [[2], [3], [7]]


@pytest.mark.parametrize(("causal", "expected"), [(False, [[2, 3], [2, 7]]), (True, [[2, 3], [2], [7]])])
def test_a_stage_keeps_axes_apart(causal, expected):
    def function(q, k):
        return functional.scaled_dot_product_attention(q, k, k, is_causal=causal, enable_gqa=True)

    assert sizes(function, torch.randn(2, 6, 7, 4), K)[: len(expected)] == expected


def test_axes_of_size_one_are_left_out_but_where_a_product_needs_them():
    assert sizes(attend, Q[:1], K[:1], V[:1]) == [[3], [7], [4], [5], [6]]
    assert sizes(attend, Q[:, :, :1], K, V) == [[2, 3], [1], [4], [5], [6]]
    assert sizes(mlp, Q[:1, :1, :1], A, B) == [[1], [4], [8], [9]]
    assert sizes(mlp, Q[..., :1].contiguous(), A[:1], B) == [[2, 3, 7], [1], [8], [9]]
    assert sizes(mlp, Q, A[:, :1].contiguous(), B[:1]) == [[2, 3, 7], [4], [1], [9]]


def test_an_operand_gets_the_dimension_that_a_view_took():
    found = tensors(drafted(lambda x, a, b: mlp(x.reshape(4)[None], a, b), torch.randn(4), A, B))
    assert sorted(axis.size for axis in found.axes["input0"]) == [1, 4]


def test_the_axes_of_values_follow_from_their_operands():
    found = tensors(drafted(attend, Q, K, V))
    assert [axis.size for axis in found.axes["value0"]] == [2, 3, 7, 5]
    assert [axis.size for axis in found.axes["value1"]] == [2, 3, 7, 6]
    assert [axis.size for axis in found.output] == [2, 3, 7, 6]
    assert [[axis.size for axis in axes] for axes in found.pinned] == [[5]]


def test_a_value_that_lacks_what_a_product_sums_over_is_cut_off():
    with pytest.raises(CutError, match="matmul_1 needs a dimension of size 1 that its operand lacks") as error:
        tensors(drafted(lambda x, a, b: (x @ a).reshape(8)[:, None] @ b, torch.randn(1, 4), A, B[:1]))
    assert error.value.node.name == "matmul"
