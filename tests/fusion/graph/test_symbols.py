import pytest
import torch
from closeness import assert_equal_up_to_rounding
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from fusion.compile import traced
from fusion.graph import Symbols, find, replace_by_operator
from fusion.run.executors import executors
from tests.fusion.counted import Executor

A, B = torch.randn(6, 8), torch.randn(8, 6)


def mlp(x, a, b):
    return functional.gelu(x @ a) @ b


def attend(x, a, b):
    heads = x.view(x.shape[0], x.shape[1], 2, 3).transpose(1, 2)
    return functional.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).reshape(x.shape)


def rows_only(x, a, b):
    return mlp(x.reshape(x.shape[0] * x.shape[1], 6), a, b).view(x.shape)


def with_symbols(function, rows, columns):
    """A graph over two sizes, a tensor of them, and whatever of A and B is read, as Dynamo makes it."""
    found = []

    def keep(graph_module, _):
        values = [node.meta["example_value"] for node in graph_module.graph.find_nodes(op="placeholder")]
        found.append(traced(graph_module, values))
        return graph_module

    x = torch.randn(rows, columns, 6)
    torch._dynamo.reset()
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(x, 1)
    torch.compile(function, backend=keep)(x, A, B)
    return found[0]


@pytest.mark.parametrize("function", [mlp, attend, rows_only])
def test_chains_with_symbols_serve_other_sizes(function):
    executors.add("reference", Executor(lambda chain, needs: None))
    graph_module = with_symbols(function, 2, 3)
    symbols = Symbols(graph_module)
    found = find(symbols.concrete(graph_module))
    assert [len(match.chain.products) for match in found.matches] == [2]
    replaced = replace_by_operator(graph_module, found, symbols, "reference", frozenset())
    rest = () if function is attend else (A, B)
    for rows, columns in ((2, 3), (5, 3), (3, 7), (6, 6)):
        x = torch.randn(rows, columns, 6)
        actual, expected = replaced(rows, columns, x, *rest)[0], function(x, A, B)
        assert_equal_up_to_rounding("result", actual, expected, roundings=64)


def test_sizes_at_which_a_graph_was_traced_come_back():
    graph_module = with_symbols(rows_only, 4, 5)
    symbols = Symbols(graph_module)
    (match,) = find(symbols.concrete(graph_module)).matches
    assert match.chain.sizes["M"] != 20
    assert symbols.hint(match.chain.sizes["M"]) == 20
    assert symbols.hint(match.chain.sizes["N"]) == 8


def test_no_number_coincides_with_a_symbol():
    (match,) = find(Symbols(graph := with_symbols(mlp, 6, 8)).concrete(graph)).matches
    assert all(match.chain.sizes["M"] % number for number in (2, 3, 6, 8))


def test_a_size_that_is_no_product_is_declined():
    graph_module = with_symbols(lambda x, a, b: mlp(torch.cat((x[:, :1], x), 1), a, b), 2, 3)
    found = find(Symbols(graph_module).concrete(graph_module))
    assert not found.matches
    assert any("symbolic size: matmul" in decline.reason for decline in found.declines)


def test_without_symbols_the_graph_stays():
    graph_module = make_fx(mlp, tracing_mode="fake", pre_dispatch=True)(torch.randn(2, 3, 6), A, B)
    assert Symbols(graph_module).concrete(graph_module) is graph_module
