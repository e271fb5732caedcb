import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from fusion.graph import Decline, Found, find, trace

X, A, B = torch.randn(7, 6), torch.randn(6, 8), torch.randn(8, 6)
attend = functional.scaled_dot_product_attention


def found(function, *args, apart=None):
    return find(trace(function, args, {}).graph_module, apart)


def in_no_grad(x, a, b):
    with torch.no_grad():
        y = x @ a
    return y @ b


def out_of_autocast(x, a, b):
    with torch.autocast("cpu", enabled=False):
        y = x @ a
    return y @ b


def written_between(x, a, b):
    y = x @ a
    b.add_(1)
    return y @ b


@pytest.mark.parametrize(
    ("function", "node", "reason"),
    [
        (lambda x, a, b: ((h := x @ a), h @ b), "matmul", "also returned, so it must be written out: return only what"),
        (lambda x, a, b: (h := x @ a) @ b + h.sum(), "matmul", "is read by sum_1 (aten.sum.default), so it must be"),
        (lambda x, a, b: ((h := x @ a) @ b, functional.relu(h) + 1), "matmul", "is read by relu too, so it must be"),
        (lambda x, a, b: functional.dropout(x @ a) @ b, "dropout", "dropout between the products: set p=0 or"),
        (lambda x, a, b: (x @ a).cumsum(0) @ b, "cumsum", "operation aten.cumsum.default is no stage of a chain"),
        (lambda x, a, b: functional.layer_norm(x @ a, (8,)) @ b, "layer_norm", "operation aten.layer_norm.default is"),
        (lambda x, a, b: torch.tanh(x @ a) @ b, "tanh", "activation aten.tanh.default is none of relu, gelu, silu"),
        (
            lambda x, a, b: (x @ a).masked_fill(x[:, :1] > 0, -1e9).softmax(-1) @ b,
            "masked_fill",
            "fill with -inf, which a softmax leaves out exactly",
        ),
        (lambda x, a, b: (x @ a) @ b, "matmul", "dtype torch.float64: accepted are float32, float16 and bfloat16"),
        (lambda x, a, b: (x @ a) @ b, "matmul", "integer matmul, torch.int64: accepted are"),
        (lambda x, a, b: (x @ a).half() @ b.half(), "matmul", "its product is in torch.float32, what reads it in"),
        (lambda x, a, b: (x @ a).reshape(8, 7) @ x, "reshape", "mixes dimensions or casts, so matmul must be written"),
        (lambda x, a, b: (x @ a)[:, :3] @ b[:3], "slice_1", "operation aten.slice.Tensor is no stage of a chain"),
        (lambda x, a, b: (x @ a) / (x @ a).sum() @ b, "div", "of two tensors: multiply or add instead"),
        (lambda x, a, b: x[:0] @ a @ b, "matmul", "is empty: nothing to compute"),
        (lambda x, a, b: torch.einsum("ij,jk,kl->il", x, a, b), "einsum", "has 3 operands: write products of two"),
        (lambda x, a, b: x @ a @ b @ a @ b @ a, "matmul", "5 products: a chain has at most 4, so matmul is"),
        (lambda x, a, b: x[x[:, 0] > 0] @ a @ b, "matmul", "symbolic size"),
        (in_no_grad, "matmul", "_set_grad_enabled_1 stands between matmul and matmul_1: torch.no_grad()"),
        (out_of_autocast, "matmul", "_exit_autocast stands between matmul and matmul_1: _exit_autocast changes how"),
        (written_between, "matmul", "add_ stands between matmul and matmul_1: aten.add_.Tensor writes into a tensor"),
        (lambda x, a, b: ((h := torch.relu(x @ a)) @ b) * (h @ b), "relu", "is read along other dimensions too"),
        (lambda x, a, b: ((x @ a)[None] + torch.rand(3, 7, 8)) @ b, "add", "expand an operand of the product instead"),
        (lambda x, a, b: attend(x @ a, x @ a, x @ a), "matmul_1", "has no loop that all other products have"),
        (
            lambda x, a, b: attend((y := x.view(1, 7, 2, 3).mT), y, y).flatten(1).view(1, 7, 6) @ a,
            "view_1",
            "it sums over 2 dimensions that cannot be one",
        ),
    ],
)  # fmt: skip
def test_what_is_not_fused_says_why(function, node, reason):
    dtype = torch.float64 if "float64" in reason else torch.int64 if "int64" in reason else torch.float32
    declines = found(function, *(tensor.clone().to(dtype) for tensor in (X, A, B))).declines
    assert any(decline.node == node and reason in decline.reason for decline in declines), list(map(str, declines))


def test_a_product_by_itself_is_a_chain_with_what_stands_behind_it():
    (match,) = found(lambda x, a, b: functional.relu(x @ a + 1), X, A, B).matches
    assert (match.output, len(match.chain.products), len(match.chain.stages)) == ("relu", 1, 3)


def test_a_product_whose_value_a_gradient_needs_ends_there():
    def function(x, a, b):
        return functional.gelu(functional.linear(x, a.T, b[:, 0]) * 2)

    graph_module = trace(function, [X, A, B], {}).graph_module
    (free,) = find(graph_module).matches
    (kept,) = find(graph_module, differentiated={"arg0_1"}).matches
    (unrelated,) = find(graph_module, differentiated={"gelu"}).matches
    assert (free.output, kept.output, unrelated.output) == ("gelu", "mul", "gelu")


def test_chains_are_found_beside_what_writes_and_casts():
    def function(x, a, b):
        with torch.autocast("cpu", enabled=False):
            y = torch.relu(x @ a) @ b
        x.add_(1)
        return torch.relu(y @ a) @ b

    assert [len(match.chain.products) for match in found(function, X.clone(), A, B).matches] == [2, 2]


def test_a_copy_is_read_where_what_it_was_made_of_is_written():
    def function(x, a, b):
        y = x.clone()
        x.add_(1)
        return y @ a @ b

    (match,) = found(function, X.clone(), A, B).matches
    assert match.bindings[0].node == "clone"


def test_symbolic_sizes_are_declined():
    graph_module = make_fx(lambda x, a, b: x @ a @ b, tracing_mode="symbolic", pre_dispatch=True)(X, A, B)
    reasons = [decline.reason for decline in find(graph_module).declines]
    assert reasons
    assert all("symbolic size" in reason for reason in reasons)


def test_chains_are_as_long_as_they_can_be():
    four = found(lambda x, a, b: torch.relu(x @ a @ b) @ a @ b + x, X, A, B)
    assert [len(match.chain.products) for match in four.matches] == [4]
    assert four.matches[0].output == "add"
    assert not four.declines
    assert not found(lambda x: x.relu(), X).matches


def test_the_projection_of_queries_is_a_part_of_attention():
    def function(x, q, k, v):
        return attend(*((x @ w).view(2, 7, 3, 2).transpose(1, 2) for w in (q, k, v))).transpose(1, 2).flatten(2)

    result = found(function, torch.randn(2, 7, 6), *(torch.randn(6, 6) for _ in range(3)))
    assert [len(match.chain.products) for match in result.matches] == [3, 1, 1]
    assert {decline.node for decline in result.declines} == {"matmul_1", "matmul_2"}


def test_nodes_may_be_asked_to_be_written_out():
    result = found(lambda x, a, b: torch.relu(x @ a) @ b @ a, X, A, B, apart={"relu": "for a reason"})
    assert Decline("relu", "for a reason") in result.declines
    assert [len(match.chain.products) for match in result.matches] == [2, 1]
    assert [binding.node for binding in result.matches[0].bindings] == ["relu", "arg2_1", "arg1_1"]


def test_chains_do_not_share_nodes():
    def function(x, a, b):
        y = torch.relu(torch.relu(x @ a) @ b)
        z = functional.layer_norm(y, (6,))
        return torch.relu(z @ a) @ b + y

    result = found(function, X, A, B)
    assert [match.output for match in result.matches] == ["add", "relu_1"]
    first, second = (set(match.covered) for match in result.matches)
    assert not first & second


def test_a_value_that_another_chain_reads_ends_its_own():
    def function(x, a, b):
        y = x @ a @ b
        return torch.relu(y.T @ x @ b.T), y.T.contiguous().sum()

    matches = found(function, X, A, B).matches
    assert "matmul_1" in {match.output for match in matches}
    inner = {node for match in matches for node in match.covered if node != match.output}
    assert not inner & {binding.node for match in matches for binding in match.bindings}


def test_layers_of_a_deep_model_are_found_alike():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)

        def forward(self, x):
            return x + self.down(functional.gelu(self.up(x)))

    deep = found(nn.Sequential(*(Block() for _ in range(24))), X)
    assert len(deep.matches) == 24
    assert len({match.chain for match in deep.matches}) == 1


def test_results_print_what_they_are():
    text = str(found(lambda x, a, b: (torch.relu(x @ a) @ b).cumsum(0) @ a, X, A, B))
    assert "chain at matmul_1: C[M,N] = A[M,K] B[K,N]; C = relu(C);" in text
    assert "not fused: cumsum: operation aten.cumsum.default is no stage of a chain" in text
    assert str(Found((), ())) == "no chain"
