import torch
from torch.nn import functional

from fusion.graph.trace import trace
from fusion.graph.uses import Uses

X, A, B = torch.randn(7, 6), torch.randn(6, 8), torch.randn(8, 6)


def uses_and_nodes(function, *args):
    graph = trace(function, args, {}).graph_module.graph
    return Uses(list(graph.nodes)), {node.name: node for node in graph.nodes}


def test_depths_count_products_one_behind_the_other():
    def function(x, a, b):
        up = torch.relu(x @ a)
        return (up * (x @ a)) @ b

    uses, nodes = uses_and_nodes(function, X, A, B)
    assert {name: depth for name, depth in ((n.name, uses.depths[n]) for n in nodes.values()) if depth} == {
        "matmul": 1,
        "relu": 1,
        "matmul_1": 1,
        "mul": 1,
        "matmul_2": 2,
    }


def test_depths_go_through_views_and_attention_but_not_past_what_is_written_out():
    def function(q, k, v):
        y = functional.scaled_dot_product_attention(q, k @ k.mT @ k, v)
        return functional.layer_norm(y, (6,)) @ v, y.transpose(1, 2) @ v.transpose(1, 2)

    q, k, v = (torch.randn(2, 6, 6, 6) for _ in range(3))
    uses, nodes = uses_and_nodes(function, q, k, v)
    assert uses.depths[nodes["scaled_dot_product_attention"]] == 4
    assert uses.depths[nodes["layer_norm"]] == 0
    assert uses.depths[nodes["matmul_2"]] == 1
    assert uses.depths[nodes["transpose"]] == 0  # layer_norm reads the attention too


def test_readers_tell_what_must_be_written_out():
    def function(x, a):
        y = x @ a
        return torch.relu(y), y.sum(), y * 2

    uses, nodes = uses_and_nodes(function, X, A)
    assert [node.name for node in uses.readers(nodes["matmul"])] == ["relu", "sum_1", "mul"]
    assert uses.outside(nodes["matmul"]) == "matmul is read by sum_1 (aten.sum.default), so it must be written out"
    assert uses.outside(nodes["relu"]).startswith("relu is also returned, so it must be written out: return only")
    assert uses.outside(nodes["arg0_1"]) == ""


def test_the_sigmoid_of_a_swish_reads_nothing():
    uses, nodes = uses_and_nodes(lambda x, a, b: ((h := x @ a) * torch.sigmoid(h)) @ b, X, A, B)
    assert [node.name for node in uses.readers(nodes["matmul"])] == ["mul"]
    assert uses.outside(nodes["matmul"]) == ""
    uses, nodes = uses_and_nodes(lambda x, a: (h := x @ a) * (s := torch.sigmoid(h)) + s, X, A)
    assert "read by sigmoid" in uses.outside(nodes["matmul"])
